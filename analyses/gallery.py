"""Every claim on one page: runs the analyses, and shows what was expected, what was found, and the plot.

Run: python -m analyses.gallery [--seed 0] [--smoke] [--out out/gallery.html]
"""

import importlib
from collections.abc import Sequence

from analyses._claim_pages import index_page
from analyses._claims import Claim
from analyses._command import read_options

ANALYSES = (
    "capacity",
    "bias_variance",
    "recurrent",
    "residual_depth",
    "toeplitz",
    "siamese",
    "penalty",
    "curriculum",
    "tied_autoencoder",
    "shared_filter",
    "adamw_decay",
    "equivariance",
    "bond_types",
    "transformer_tying",
    "soft_convolution",
)


def main(argv: Sequence[str] | None = None) -> dict[str, Claim]:
    """Run the analyses with the same options, each page beside the index, and write the index."""
    options = read_options(__doc__, "gallery.html", argv)
    short = ["--smoke"] if options.smoke else []
    claims = {}
    for name in ANALYSES:
        page = options.out.with_name(f"{name}.html")
        run = importlib.import_module(f"analyses.{name}").main
        claims[name] = run([*short, "--seed", str(options.seed), "--out", str(page)])
    options.out.write_text(index_page(claims), encoding="utf-8")
    print(f"Gallery: {options.out}")
    return claims


if __name__ == "__main__":
    main()
