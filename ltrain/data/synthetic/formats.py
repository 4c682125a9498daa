"""What keys and values look like: formats for training, and others, of other words, for evaluation. All begin and end with a letter or digit."""

import random
import string
from collections.abc import Callable, Sequence

WORDS = """
acorn alder amber anchor apple arrow aspen badger bamboo barley basil beacon beaver birch bison blossom bramble brass breeze bridge bronze brook
butter button cabin cactus candle canyon carbon castle cedar chalk cherry chimney cinder citrus clover cobalt comet copper coral cotton cradle crane
crater cricket crimson crystal daisy delta denim desert dolphin dragon drift eagle ebony echo ember emerald falcon feather fennel fern fiddle finch
flame flint forest fossil fountain fox frost garden garnet ginger glacier granite grape harbor hazel heather heron hollow honey horizon hornet indigo
iris island ivory ivy jade jasmine jasper juniper kettle lagoon lantern larch laurel lavender lemon lichen lilac linen lotus lynx magnet maple marble
marsh meadow melon meteor mirror mist monsoon mosaic moss mustard nectar nettle nickel nutmeg oasis ocean olive onyx opal orbit orchid osprey otter
oxide paddle panther pebble pepper piano pine planet plaza plum pollen poppy prairie prism pumpkin quail quartz rabbit radar raven reef ribbon ridge
river robin rocket rose ruby saffron salmon sapphire satin scarlet shadow silver spruce summit sunset thistle thunder tiger timber topaz tulip tundra
turtle valley velvet violet walnut willow winter wolf zebra zephyr
""".split()
HELD_OUT_WORDS = """
abacus alcove ballad bassoon beret bobbin cello chisel cipher cloister cobbler compass corridor cupola dagger easel fathom ferry fresco gable galleon
gazebo goblet gondola hammock harness hymn jigsaw kimono ladder lattice lever locket lyre mallet mandolin mural nozzle obelisk organ parapet pennant
pulley quill rafter sable satchel saucer scaffold sextant spindle stencil tablet tassel trellis trombone turret vellum waltz wicket
""".split()

Format = Callable[[random.Random], str]


def _text(rng: random.Random, alphabet: str, least: int, most: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(least, most)))


def _hexadecimal(rng: random.Random, least: int = 6, most: int = 10) -> str:
    return _text(rng, "0123456789abcdef", least, most)


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1800, 2199)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


SEPARATORS = ("", *"_.~+=|#@")  # of assembled codes; those of HELD_OUT_FORMATS are others, or stand between other parts
PARTS: tuple[Format, ...] = (
    lambda rng: _text(rng, string.digits, 1, 6),
    lambda rng: _text(rng, string.ascii_uppercase, 1, 5),
    lambda rng: _text(rng, string.ascii_lowercase, 2, 5),
    lambda rng: _hexadecimal(rng, 3, 8),
)
CASES = (str, str.capitalize, str.upper)


def assembled(parts: int, words: Sequence[str] = WORDS) -> Format:
    """Codes of so many parts, some of them words but not all: who has seen many shapes copies those that he has not seen."""

    def code(rng: random.Random) -> str:
        kinds = [rng.random() < 0.5 for _ in range(parts)]
        kinds[rng.randrange(parts)] = False  # words alone may stand in a text anyway
        return rng.choice(SEPARATORS).join(rng.choice(CASES)(rng.choice(words)) if word else rng.choice(PARTS)(rng) for word in kinds)

    return code


FORMATS: dict[str, Format] = {
    "digits": lambda rng: _text(rng, string.digits, 4, 8),
    "hexadecimal": _hexadecimal,
    "words": lambda rng: "-".join(rng.sample(WORDS, 2)),
    "uuid": lambda rng: "-".join(_hexadecimal(rng, n, n) for n in (8, 4, 4)),
    "camel": lambda rng: "".join(word.capitalize() for word in rng.sample(WORDS, rng.randint(2, 3))),
    "snake": lambda rng: "_".join([*rng.sample(WORDS, 2), str(rng.randint(0, 99))]),
    "base32": lambda rng: _text(rng, string.ascii_uppercase + "234567", 6, 9),
    "date": _date,
    "address": lambda rng: ".".join(str(rng.randint(1, 254)) for _ in range(4)),
    "constant": lambda rng: "_".join(word.upper() for word in rng.sample(WORDS, 2)),
    "lowercase": lambda rng: _text(rng, string.ascii_lowercase, 5, 8),
    **{f"assembled-{parts}": assembled(parts) for parts in range(2, 9)},
}
HELD_OUT_FORMATS: dict[str, Format] = {
    "plate": lambda rng: f"{_text(rng, string.ascii_uppercase, 3, 3)}-{_text(rng, string.digits, 4, 4)}",
    "clock": lambda rng: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}.{rng.randint(0, 999):03}",
    "path": lambda rng: "/".join([*rng.sample(HELD_OUT_WORDS, 2), str(rng.randint(10, 99))]),
    "pair": lambda rng: f"{_text(rng, string.digits, 4, 4)}-{_text(rng, string.digits, 5, 5)}",
}

# Names of variables, which have to be identifiers.
NAMES: dict[str, Format] = {name: FORMATS[name] for name in ("camel", "snake", "constant", "lowercase")}
HELD_OUT_NAMES: dict[str, Format] = {
    "dunder": lambda rng: f"{rng.choice(HELD_OUT_WORDS)}__{rng.choice(HELD_OUT_WORDS)}",
    "numbered": lambda rng: f"{rng.choice(HELD_OUT_WORDS).capitalize()}{rng.randint(100, 999)}",
    "letters": lambda rng: f"{_text(rng, string.ascii_uppercase, 5, 5)}",
}
