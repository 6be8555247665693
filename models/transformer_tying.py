"""A small transformer on letters: do its two embeddings agree, and do its layers?

Text: the opening of Lewis Carroll, Alice's Adventures in Wonderland (1865).
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bayestie as bt

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"  # every other sign is a space


class Block(nn.Module):
    """Causal attention and a perceptron, each added to what comes in."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = self.query(y) @ self.key(y).mT / x.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        x = x + scores.masked_fill(later, -torch.inf).softmax(-1) @ self.value(y)
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Transformer(nn.Module):
    """Logits of the next symbol at every place.

    Args:
        num_symbols: size of the alphabet.
        context: places that are seen.
        width: of a symbol's embedding.
        depth: number of blocks.
        shared: tie the way PyTorch does, one matrix as both embeddings and one block at every depth.
    """

    def __init__(self, num_symbols: int, context: int, width: int, depth: int, shared: bool = False):
        super().__init__()
        self.embed, self.place = nn.Embedding(num_symbols, width), nn.Embedding(context, width)
        blocks = [Block(width, 2 * width) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks[:1] * depth if shared else blocks)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, num_symbols)
        if shared:
            self.head.weight = self.embed.weight

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embed(symbols) + self.place.weight[: symbols.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def transformer_tying(text, net, *, sigma_embedding, sigma_depth):
    """Next symbol ~ transformer(symbols before), two ties: input to output embedding, block to block.

    Args:
        text: symbols in windows, shape (windows, context + 1).
        net: the `Transformer`; its own weights are not used.
        sigma_embedding: prior sd of an entry of the input less the output embedding, >= 0; form `matched`.
        sigma_depth: sd scale of a parameter's change from a block to the next, >= 0 or inf; form `matched`.
    """
    unit = dist.Normal(0.0, 1.0)
    pair, depth = ["embed.weight", "head.weight"], bt.Tie.chain(len(net.blocks))
    embeddings = bt.nn.tied_parameters(
        "embedding", net, pair, bt.Tie.complete(2), sigma_embedding, unit, form="matched"
    )
    blocks = bt.nn.tied_modules("block", list(net.blocks), depth, sigma_depth, bt.nn.fan_in(), form="matched")
    rest = bt.nn.free_parameters("net", net, unit, names=["place.weight", "head.bias"])
    logits = bt.nn.bind(net, embeddings, blocks.named("blocks"), rest)(text[..., :-1])
    with pyro.plate("window", text.shape[-2], dim=-2), pyro.plate("place", text.shape[-1] - 1, dim=-1):
        pyro.sample("next", dist.Categorical(logits=logits), obs=text[..., 1:])


def log_bilinear(text, net, *, sigma_embedding):
    """Next symbol ~ softmax(E_out e_in(symbol) + bias): the two embeddings with no block between.

    Args:
        text: as above.
        net: an Embedding and a Linear of its transposed shape, in a Sequential.
        sigma_embedding: as above.
    """
    unit = dist.Normal(0.0, 3.0)
    pair = ["0.weight", "1.weight"]
    weights = bt.nn.tied_parameters(
        "embedding", net, pair, bt.Tie.complete(2), sigma_embedding, unit, form="matched"
    )
    rest = bt.nn.free_parameters("net", net, unit, names=["1.bias"])
    logits = bt.nn.bind(net, weights, rest)(text[..., :-1])
    with pyro.plate("window", text.shape[-2], dim=-2), pyro.plate("place", text.shape[-1] - 1, dim=-1):
        pyro.sample("next", dist.Categorical(logits=logits), obs=text[..., 1:])


def letters() -> Tensor:
    """The text as numbers of `SYMBOLS`: letters in lower case, one space for whatever stands between them."""
    kept = "".join(c if c in SYMBOLS else " " for c in TEXT.lower().replace("'", ""))
    return torch.tensor([SYMBOLS.index(c) for c in " ".join(kept.split())])


def cut(symbols: Tensor, context: int) -> Tensor:
    """A text in windows, (windows, context + 1), each beginning with the last symbol of the one before."""
    return symbols.unfold(0, context + 1, context)


def data(seed=0, num=600, context=8, width=4, depth=3):
    """The model's arguments with their labels: `num` symbols of the text, from a random place on."""
    symbols, generator = letters(), torch.Generator().manual_seed(seed)
    start = int(torch.randint(len(symbols) - num, (), generator=generator))
    net = Transformer(len(SYMBOLS), context, width, depth).requires_grad_(False)
    labels = {
        "side": ["input", "output"],
        "symbol": list(SYMBOLS.replace(" ", "_")),
        "width": [*range(width)],
    }
    return {
        "text": cut(symbols[start : start + num], context),
        "net": net,
        "coords": labels,
        "dims": {"embedding": list(labels)},
    }


TEXT = """
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do:
once or twice she had peeped into the book her sister was reading, but it had no pictures or conversations
in it, "and what is the use of a book," thought Alice "without pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very sleepy and
stupid), whether the pleasure of making a daisy-chain would be worth the trouble of getting up and picking
the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way to hear the
Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over afterwards, it occurred
to her that she ought to have wondered at this, but at the time it all seemed quite natural); but when the
Rabbit actually took a watch out of its waistcoat-pocket, and looked at it, and then hurried on, Alice
started to her feet, for it flashed across her mind that she had never before seen a rabbit with either a
waistcoat-pocket, or a watch to take out of it, and burning with curiosity, she ran across the field after
it, and fortunately was just in time to see it pop down a large rabbit-hole under the hedge.

In another moment down went Alice after it, never once considering how in the world she was to get out
again.

The rabbit-hole went straight on like a tunnel for some way, and then dipped suddenly down, so suddenly that
Alice had not a moment to think about stopping herself before she found herself falling down a very deep
well.

Either the well was very deep, or she fell very slowly, for she had plenty of time as she went down to look
about her and to wonder what was going to happen next. First, she tried to look down and make out what she
was coming to, but it was too dark to see anything; then she looked at the sides of the well, and noticed
that they were filled with cupboards and book-shelves; here and there she saw maps and pictures hung upon
pegs. She took down a jar from one of the shelves as she passed; it was labelled "ORANGE MARMALADE", but to
her great disappointment it was empty: she did not like to drop the jar for fear of killing somebody
underneath, so managed to put it into one of the cupboards as she fell past it.

"Well!" thought Alice to herself, "after such a fall as this, I shall think nothing of tumbling down stairs!
How brave they'll all think me at home! Why, I wouldn't say anything about it, even if I fell off the top of
the house!" (Which was very likely true.)

Down, down, down. Would the fall never come to an end? "I wonder how many miles I've fallen by this time?"
she said aloud. "I must be getting somewhere near the centre of the earth. Let me see: that would be four
thousand miles down, I think" (for, you see, Alice had learnt several things of this sort in her lessons in
the schoolroom, and though this was not a very good opportunity for showing off her knowledge, as there was
no one to listen to her, still it was good practice to say it over) "yes, that's about the right distance,
but then I wonder what Latitude or Longitude I've got to?" (Alice had no idea what Latitude was, or
Longitude either, but thought they were nice grand words to say.)

Presently she began again. "I wonder if I shall fall right through the earth! How funny it'll seem to come
out among the people that walk with their heads downward! The Antipathies, I think" (she was rather glad
there was no one listening, this time, as it didn't sound at all the right word) "but I shall have to ask
them what the name of the country is, you know. Please, Ma'am, is this New Zealand or Australia?" (and she
tried to curtsey as she spoke, fancy curtseying as you're falling through the air! Do you think you could
manage it?) "And what an ignorant little girl she'll think me for asking! No, it'll never do to ask: perhaps
I shall see it written up somewhere."
"""
