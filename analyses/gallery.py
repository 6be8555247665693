"""Every claim on one page: runs the analyses and writes an index of what was expected and found.

Run: python -m analyses.gallery [--seed 0] [--smoke] [--out out/gallery.html]
"""

import html
import importlib
from collections.abc import Sequence

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
    options.out.write_text(_index(claims), encoding="utf-8")
    print(f"Gallery: {options.out}")
    return claims


def _index(claims: dict[str, Claim]) -> str:
    rows = "".join(
        f'<tr><td><a href="{name}.html">{html.escape(claim.row)}</a></td><td>{html.escape(finding.what)}</td>'
        f"<td>{html.escape(finding.wanted)}</td><td>{html.escape(finding.seen)}</td>"
        f"<td>{'holds' if finding.holds else '<b>fails</b>'}</td></tr>"
        for name, claim in claims.items()
        for finding in claim.findings
    )
    return _TEMPLATE.format(rows=rows)


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Claims</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ccc; }}
</style></head><body><h1>Claims: expected and found</h1>
<p>Each row links to the page with its plot.</p>
<table><thead><tr><th>claim</th><th>quantity</th><th>expected</th><th>found</th><th></th></tr></thead>
<tbody>{rows}</tbody></table></body></html>
"""


if __name__ == "__main__":
    main()
