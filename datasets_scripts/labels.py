"""Readable nouns for the labels of segmentation datasets, and which of them may be mistaken for one another."""

import random
from dataclasses import dataclass, replace
from typing import Literal

from mglmm.processing.uscdf import CONTROL_TOKENS, REGION_TOKEN, escape_control_tokens

Kind = Literal["count", "plural", "mass", "unique"]

# Labels that no rule can guess: (noun, kind).
TABLE: dict[str, tuple[str, Kind]] = {
    "wall-brick": ("brick wall", "count"),
    "wall-stone": ("stone wall", "count"),
    "wall-tile": ("tiled wall", "count"),
    "wall-wood": ("wooden wall", "count"),
    "floor-wood": ("wooden floor", "count"),
    "window-blind": ("window blind", "count"),
    "playingfield": ("playing field", "count"),
    "tree-merged": ("trees", "plural"),
    "rock-merged": ("rocks", "plural"),
    "flower": ("flowers", "plural"),
    "railroad": ("railway track", "count"),
    "ashcan": ("trash can", "count"),
    "minibike": ("motorbike", "count"),
    "trade name": ("shop sign", "count"),
    "light": ("lamp", "count"),
    "tv": ("tv", "count"),
}
# Nouns that are plural in themselves: no article, "are".
PLURAL = frozenset(
    "shoes pants trousers jeans sunglasses glasses boots sandals heels sneakers trainers loafers pumps flats wedges "
    "leggings stockings tights socks shorts gloves earrings accessories skis scissors stairs clouds leaves clothes".split()
) | {"high heels", "metal shutters", "spectacles", "water drops"}
# Nouns that cannot be counted: no article, "is".
MASS = frozenset(
    "hair skin grass snow sand water gravel dirt food paper cardboard broccoli fruit pavement housing wood metal plastic "
    "cloth textile furniture fog moss mud straw salad signage vegetation terrain stone".split()
)
# Things of which a scene has one: always "the".
UNIQUE = frozenset({"sky", "sea", "ground", "floor", "ceiling"})
IRREGULAR = {"person": "people", "knife": "knives", "shelf": "shelves", "mouse": "mice", "sheep": "sheep"}

# Other words for the same thing. The first word of a label stays its usual one.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "pants": ("trousers",),
    "sunglasses": ("shades",),
    "glasses": ("spectacles",),
    "sneakers": ("trainers",),
    "heels": ("high heels",),
    "sweater": ("pullover",),
    "t-shirt": ("tee",),
    "watch": ("wristwatch",),
    "hood": ("bonnet",),
    "front glass": ("windshield", "windscreen"),
    "back glass": ("rear window", "rear windshield"),
    "front bumper": ("bumper at the front",),
    "back bumper": ("rear bumper",),
    "front left light": ("left headlight",),
    "front right light": ("right headlight",),
    "back left light": ("left taillight", "left tail light"),
    "back right light": ("right taillight", "right tail light"),
    "back left door": ("rear left door",),
    "back right door": ("rear right door",),
    "left mirror": ("left side mirror",),
    "right mirror": ("right side mirror",),
    "couch": ("sofa",),
    "cell phone": ("mobile phone", "phone"),
    "tv": ("television",),
    "airplane": ("plane",),
    "motorcycle": ("motorbike",),
    "bicycle": ("bike",),
    "refrigerator": ("fridge",),
    "potted plant": ("plant in a pot",),
    "donut": ("doughnut",),
    "rug": ("carpet",),
    "curtain": ("drape",),
}
PLURAL |= {"shades"}

# A label is asked for as *absent* only if no noun of its groups is in the image: annotators (and readers) mix these up.
CONFUSABLE: tuple[frozenset[str], ...] = tuple(
    frozenset(group.split(" ") if "," not in group else group.split(", "))
    for group in (
        "coat jacket blazer suit cape cardigan vest",
        "sweater sweatshirt jumper cardigan",
        "blouse shirt t-shirt top sweater sweatshirt jumper bodysuit bra romper vest",
        "dress romper bodysuit blouse top jumper skirt",
        "suit pants blazer vest",
        "shoes boots sandals heels sneakers loafers pumps flats wedges",
        "pants jeans leggings tights stockings shorts",
        "socks stockings tights leggings",
        "shorts romper skirt",
        "bag, purse, wallet, handbag, backpack, suitcase",
        "glasses sunglasses",
        "scarf tie cape necklace",
        "bracelet watch ring",
        "hat helmet",
        "accessories belt bracelet necklace ring earrings watch scarf gloves tie hat sunglasses glasses",
        "trunk, tailgate",
        "mirror, left mirror, right mirror",
        # The front and the back of a car are told apart, its left and right less surely.
        "glass, windshield, window, shop window, front glass",
        "glass, window, back glass",
        "front left light, front right light, headlight",
        "back left light, back right light, taillight",
        "bumper, front bumper",
        "bumper, back bumper",
        "door, double door",
        "door, front left door, front right door",
        "door, back left door, back right door",
        "car, truck, bus, van, train, motorcycle, motorbike, bicycle, boat, airplane",
        "chair, couch, bench, bed, pillow",
        "cup, bowl, wine glass, bottle, vase",
        "fork, knife, spoon, scissors, toothbrush",
        "road, pavement, sidewalk, platform, railway track, gravel, dirt, sand, ground, central reservation",
        "grass, dirt, playing field, sand, snow, ground",
        "tree, trees, grass, plant, potted plant, flowers, vase",
        "sea, river, water, fountain",
        "mountain, rocks, stone wall",
        "building, house, bridge, roof, wall, platform",
        "wall, brick wall, stone wall, tiled wall, wooden wall, ceiling",
        "floor, wooden floor, rug, ground, platform, pavement",
        "table, dining table, counter, desk, shelf, cabinet",
        "shelf, cabinet, refrigerator, oven, microwave, sink, counter",
        "window, window blind, curtain, mirror, net",
        "fence, net, stairs",
        "lamp, traffic light, streetlight",
        "banner, awning, signboard, shop sign, stop sign, cardboard, paper, book",
        "towel, rug, pillow, curtain",
        "tv, laptop, keyboard, mouse, remote, cell phone",
        "skis, snowboard, skateboard, surfboard",
        "sports ball, frisbee, baseball glove",
        "tennis racket, baseball bat",
        "kite, airplane, bird, umbrella",
        "food, pizza, sandwich, hot dog, cake, donut, carrot, broccoli, apple, orange, banana, fruit",
        "bear, teddy bear, dog, cat, sheep, horse",
        "container, trash can, suitcase, toilet",
        # Classes of ADE20K, COCO-Stuff and Mapillary Vistas.
        "chair, armchair, swivel chair, seat, stool, ottoman, bench, sofa, couch",
        "stairs, stairway, step, escalator",
        "painting, poster, bulletin board, picture",
        "monitor, crt screen, projection screen, tv, computer, laptop",
        "house, building, skyscraper, hut, tower, booth",
        "sea, water, river, lake, waterfall, swimming pool",
        "ground, land, field, grass, dirt track, path, sand, dirt, mud, terrain",
        "plant, palm tree, tree, trees, flowers, bush, branch, leaves, vegetation, moss, potted plant",
        "light, lamp, sconce, chandelier, streetlight, street light",
        "pole, column, pedestal, utility pole",
        "railing, bannister, fence, guard rail",
        "hill, mountain, rocks, stone",
        "boat, ship",
        "cabinet, cupboard, wardrobe, chest of drawers, sideboard, shelf, bookcase, furniture",
        "rug, carpet, mat",
        "cloth, clothes, textile, towel, blanket, napkin",
        "sky, clouds, fog",
        "table, coffee table, desk, dining table, counter, countertop, kitchen island",
        "wood, metal, plastic, paper, cardboard",
        "food, salad, vegetable, fruit",
        "box, basket, barrel, tray",
        "cushion, pillow",
        "street sign, stop sign, signboard, traffic sign, signage",
        "concrete wall, panelled wall, wall, brick wall, stone wall, tiled wall, wooden wall",
        "marble floor, stone floor, tiled floor, wooden floor, floor",
        "tiled ceiling, ceiling",
    )
)

# Things that a photograph of one street scene does not hide in its unlabelled background. Where only the main subject
# is annotated, nothing else of another dataset may be called absent.
ELSEWHERE = frozenset(
    "airplane, apple, banana, bear, bed, bird, bowl, broccoli, cake, carrot, cat, donut, elephant, fork, frisbee, "
    "giraffe, hot dog, keyboard, kite, knife, laptop, microwave, mouse, orange, oven, pizza, refrigerator, remote, "
    "sandwich, scissors, sheep, sink, skateboard, skis, snowboard, spoon, sports ball, surfboard, teddy bear, "
    "tennis racket, toaster, toilet, toothbrush, towel, train, vase, wine glass, zebra, baseball bat, baseball glove, "
    "sea, fountain, pillow, horse, dress, skirt, scarf, necklace, bracelet, belt, boots, gloves, tie, stockings, "
    "sandals, romper, cape, cardigan, blouse".split(", ")
)

# Parts of a person that are not worn.
BODY = frozenset(
    "hair skin face head neck arm arms hand hands leg legs foot feet torso back eye eyes ear ears nose mouth".split()
)
# What a person of the same picture is said to be "with".
CARRIED = frozenset({"bag", "purse", "wallet", "handbag", "backpack"})


# Parts that are asked for in vain where their owner is absent: what everybody knows these things to have.
PARTS: dict[str, tuple[str, ...]] = {
    "airplane": ("wing", "tail", "engine", "nose"),
    "bear": ("head", "ear", "paw"),
    "bed": ("headboard", "mattress"),
    "bicycle": ("wheel", "saddle", "handlebar", "pedal"),
    "bird": ("wing", "beak", "tail"),
    "boat": ("mast", "sail", "bow"),
    "bus": ("wheel", "windshield", "door"),
    "cat": ("tail", "paw", "ear"),
    "chair": ("back", "seat", "leg"),
    "clock": ("face", "hand"),
    "dog": ("tail", "paw", "ear", "nose"),
    "elephant": ("trunk", "ear", "tusk", "tail"),
    "giraffe": ("neck", "head", "leg"),
    "horse": ("tail", "head", "mane", "leg"),
    "house": ("roof", "door", "window"),
    "keyboard": ("space bar", "enter key"),
    "kite": ("tail", "string"),
    "knife": ("blade", "handle"),
    "laptop": ("screen", "keyboard"),
    "microwave": ("door", "handle"),
    "motorcycle": ("wheel", "seat", "handlebar"),
    "oven": ("door", "handle"),
    "refrigerator": ("door", "handle"),
    "sheep": ("head", "ear", "tail"),
    "skateboard": ("wheel", "deck"),
    "surfboard": ("fin", "nose"),
    "teddy bear": ("ear", "paw", "nose"),
    "tennis racket": ("handle", "strings"),
    "toaster": ("cord", "lever"),
    "toilet": ("lid", "seat"),
    "train": ("wheel", "windshield", "door"),
    "truck": ("wheel", "windshield", "door"),
    "umbrella": ("handle", "canopy"),
    "vase": ("rim", "handle"),
    "wine glass": ("stem", "rim"),
    "zebra": ("tail", "mane", "head"),
}
PLURAL |= {"strings"}


@dataclass(frozen=True)
class Noun:
    """A noun and how it counts.

    Example:
        >>> Noun("hat").indefinite(), Noun("hat").definite(3), Noun("jeans", "plural").indefinite()
        ('a hat', 'the hats', 'jeans')
    """

    name: str
    kind: Kind = "count"

    def is_plural(self, count: int = 1) -> bool:
        return self.kind == "plural" or (self.kind == "count" and count > 1)

    def bare(self, count: int = 1) -> str:
        """Without an article: "hat", "hats", "jeans", "hair"."""
        return _plural(self.name) if self.kind == "count" and count > 1 else self.name

    def definite(self, count: int = 1) -> str:
        return f"the {self.bare(count)}"

    def possessive(self, count: int = 1) -> str:
        """The definite form as an owner: "the car's", "the cars'"."""
        owner = self.definite(count)
        return f"{owner}'" if self.is_plural(count) and owner.endswith("s") else f"{owner}'s"

    def indefinite(self, count: int = 1) -> str:
        """First mention: "a hat", "two hats", "several hats", "jeans", "hair", "the sky"."""
        if self.kind == "unique":
            return self.definite()
        if self.kind != "count":
            return self.name
        if count > 1:
            return f"{'two' if count == 2 else 'several'} {self.bare(count)}"
        return f"{'an' if self.name[0] in 'aeio' or self.name.startswith('umbrella') else 'a'} {self.name}"

    def none(self, count: int = 1) -> str:
        """A clause that denies it: "there is no hat", "there are no shoes"."""
        return f"there {'are' if self.is_plural(count) else 'is'} no {self.bare(count)}"

    def coloured(self, colour: str) -> "Noun":
        return replace(self, name=f"{colour} {self.name}")

    def reworded(self, rng: random.Random, share: float = 0.25) -> "Noun":
        """The noun itself, or in `share` of the draws another word for the same thing."""
        names = SYNONYMS.get(self.name)
        if names is None or rng.random() >= share:
            return self
        return replace(self, name=rng.choice(names))


def readable(label: str) -> Noun:
    """The noun of a dataset's label: "sky-other-merged" -> the sky, "wall-brick" -> a brick wall, "shoes" -> shoes.

    The name is in lower case and holds no control token, whatever the label holds.

    Raises:
        ValueError: nothing is left of the label.
    """
    if label in TABLE:
        name, kind = TABLE[label]
        return Noun(name, kind)
    name = label.lower()
    for suffix in ("-merged", "-other", "-stuff"):
        name = name.removesuffix(suffix)
    if name != "t-shirt":
        name = name.replace("-", " ")
    name = " ".join(escape_control_tokens(name.replace("_", " "), (*CONTROL_TOKENS, REGION_TOKEN)).split())
    if not name:
        raise ValueError(f"label {label!r} has no readable name")
    head = name.rsplit(" ", 1)[-1]
    for kind, names in (("plural", PLURAL), ("mass", MASS), ("unique", UNIQUE)):
        if name in names or (kind == "plural" and head in names):
            return Noun(name, kind)
    return Noun(name)


def confusable(name: str) -> frozenset[str]:
    """All readable names that may be meant by `name`, itself included."""
    return frozenset({name}).union(*(group for group in CONFUSABLE if name in group))


def _plural(name: str) -> str:
    start, _, head = name.rpartition(" ")
    if head in IRREGULAR:
        head = IRREGULAR[head]
    elif head.endswith(("s", "x", "z", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2:-1] not in tuple("aeiou"):
        head = f"{head[:-1]}ies"
    else:
        head += "s"
    return f"{start} {head}".strip()
