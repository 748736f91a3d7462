"""The training data of the default model: its concepts, their names, images and captions.

The images are emoji in three styles, rendered from icon sets on npm (`rebuild_emoji`), on white at 64x64.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "fastldm" / "assets"
WORK = HERE / "runs"
CONCEPTS_FILE = ASSETS / "default" / "concepts.json"

SIZE = 64  # pixels of an image's side
STYLES = {
    "noto": "noto",
    "fluent-emoji-flat": "flat",
    "fluent-emoji": "3d",
}  # icon set -> its word in a prompt
PLAIN_STYLE = "flat"  # the style of a prompt without one
GROUPS = {"Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities"}
# A common word: the name of the emoji.
COMMON_NAMES = """
apple: red apple; orange: tangerine; cherry: cherries; grape: grapes; kiwi: kiwi fruit; corn: ear of corn;
pepper: bell pepper; chili: hot pepper; peanut: peanuts; pancake: pancakes; cheese: cheese wedge; meat: cut of
meat; burger: hamburger; fries: french fries; hotdog: hot dog; salad: green salad; rice: cooked rice; noodles:
steaming bowl; soup: pot of food; pasta: spaghetti; cake: shortcake; chocolate: chocolate bar; honey: honey pot;
milk: glass of milk; coffee: hot beverage; tea: teacup without handle; wine: wine glass; beer: beer mug;
cocktail: cocktail glass; juice: beverage box; water: droplet; donut: doughnut; puppy: dog face; kitten: cat
face; bunny: rabbit face; bull: ox; sheep: ewe; rhino: rhinoceros; hippo: hippopotamus; hen: chicken; chick:
baby chick; bee: honeybee; ladybug: lady beetle; dinosaur: t-rex; tree: deciduous tree; flower: blossom; daisy:
blossom; leaf: maple leaf; clover: four leaf clover; moon: crescent moon; rain: cloud with rain; snow: cloud
with snow; lightning: cloud with lightning; wave: water wave; earth: globe showing americas; planet: ringed
planet; beach: beach with umbrella; island: desert island; home: house; office: office building; tower: tokyo
tower; bridge: bridge at night; car: automobile; truck: delivery truck; bike: bicycle; scooter: motor scooter;
plane: airplane; boat: sailboat; saw: carpentry saw; knife: kitchen knife; fork: fork and knife; lock: locked;
book: closed book; phone: mobile phone; computer: laptop; tv: television; clock: alarm clock; lamp: couch and
lamp; bulb: light bulb; bag: handbag; hat: top hat; shirt: t-shirt; shoe: man’s shoe; boot: woman’s boot; boots:
woman’s boot; diamond: gem stone; piano: musical keyboard; ball: soccer ball; football: soccer ball; soccer:
soccer ball; dice: game die; chess: chess pawn; puzzle: puzzle piece; teddy: teddy bear; gift: wrapped gift;
present: wrapped gift; medal: 1st place medal; couch: couch and lamp; sofa: couch and lamp; box: package;
letter: envelope; mail: incoming envelope; map: world map; money: money bag; gun: water pistol; pumpkin:
jack-o-lantern
"""

# The words of the contact sheet: those that people type first, whatever their images look like.
COMMON_WORDS = """
apple banana grapes strawberry cherries lemon pear watermelon pineapple tomato carrot broccoli potato mushroom
bread cheese pizza hamburger cookie egg cat dog horse cow pig mouse rabbit elephant lion bear monkey fish bird
butterfly bee snake turtle octopus whale frog tree rose sunflower sun cloud rainbow snowflake house castle
mountain car bus train airplane bicycle ship rocket hammer key book umbrella guitar bell crown
"""

Concept = dict[str, Any]  # names, codes (Unicode, hexadecimal), group, tags

# ----------------------------------------------------------------------------------------------------- choice


def choose_concepts(folder: Path) -> list[Concept]:
    """Every emoji of GROUPS that all three styles have, those with the most common names first.

    The rank of a word is its index in CLIP's vocabulary, which is sorted by frequency; a name has the rank of its
    rarest word. Besides its own name a concept has those of COMMON_NAMES.
    """
    ranks = {"".join(m.split())[:-4]: i for i, m in enumerate(read_merges()) if m.endswith("</w>")}
    also: dict[str, list[str]] = {}
    for pair in " ".join(COMMON_NAMES.split()).split("; "):
        word, name = pair.split(": ")
        also.setdefault(name, []).append(word)
    concepts = []
    for code, entry in json.loads((folder / "captions.json").read_text()).items():
        if entry["group"] in GROUPS and STYLES.keys() <= set(entry["sets"]):
            names = [entry["name"].lower(), *also.get(entry["name"].lower(), [])]
            concepts.append({"names": names, "codes": [code], "group": entry["group"], "tags": entry["tags"]})
    return sorted(concepts, key=lambda c: (max(ranks.get(w, len(ranks)) for w in c["names"][0].split()), c["names"]))


def read_merges() -> list[str]:
    """CLIP's 48,894 merges, most common first."""
    with gzip.open(ASSETS / "clip_bpe" / "merges.txt.gz", "rt", encoding="utf-8") as f:
        return f.read().rstrip("\n").split("\n")[1:]


def load_pictures(folder: Path, codes: list[str]) -> Tensor:
    """uint8 (N, styles, 3, 64, 64)"""
    out = np.empty((len(codes), len(STYLES), 3, SIZE, SIZE), np.uint8)
    for s, name in enumerate(STYLES):
        with zipfile.ZipFile(folder / f"{name}_128.zip") as archive:
            for i, code in enumerate(codes):
                picture = Image.open(io.BytesIO(archive.read(f"{code}.webp"))).convert("RGB")
                out[i, s] = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX)).transpose(2, 0, 1)
    return torch.from_numpy(out)


def shrink(pictures: Tensor) -> Tensor:
    """(N, 3, 64, 64) to 32x32 by box averaging, flattened, for comparisons: (N, D)"""
    return F.avg_pool2d(pictures, SIZE // 32).flatten(1)


def load_data(work: Path) -> tuple[list[Concept], Tensor]:
    """The concepts, and their pictures as uint8 (C, styles, 3, 64, 64)."""
    data = torch.load(work / "data.pt")
    return data["concepts"], data["pictures"]


# --------------------------------------------------------------------------- data, from the original packages

NPM = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "emojibase-data": "17.0.0",
    "emojilib": "4.0.3",
}
EMOJIBASE_GROUPS = {
    3: "Animals & Nature",
    4: "Food & Drink",
    5: "Travel & Places",
    6: "Activities",
    7: "Objects",
}


def rebuild_emoji(folder: Path) -> Path:
    """Render every emoji of GROUPS from npm's icon sets to SET_128.zip, with CODE.webp in it, and captions.json."""
    import resvg_py

    if (folder / "captions.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    captions = npm_captions(folder)
    flat_icons = npm_json("@iconify-json/fluent-emoji-flat", "chars.json", folder)
    for style in STYLES:
        package = f"@iconify-json/{style}"
        icons = npm_json(package, "icons.json", folder)
        # the 3d set has no table from characters to icons; its icons have the names of the flat one
        names = flat_icons if style == "fluent-emoji" else npm_json(package, "chars.json", folder)
        with zipfile.ZipFile(folder / f"{style}_128.zip", "w") as archive:
            for character, name in names.items():
                name = icons.get("aliases", {}).get(name, {}).get("parent", name)
                code = plain_code(character)
                if code in captions and name in icons["icons"] and style not in captions[code]["sets"]:
                    svg = svg_of(icons, name)
                    png = resvg_py.svg_to_bytes(svg_string=svg, width=128, height=128, background="white")
                    picture = io.BytesIO()
                    Image.open(io.BytesIO(bytes(png))).convert("RGB").save(picture, "WEBP", lossless=True)
                    archive.writestr(f"{code}.webp", picture.getvalue())
                    captions[code]["sets"].append(style)
    (folder / "captions.json").write_text(json.dumps(captions, ensure_ascii=False, indent=1))
    return folder


def npm_captions(folder: Path) -> dict[str, Any]:
    """Name, tags and group of every emoji of GROUPS, by code."""
    keywords = npm_json("emojilib", "dist/emoji-en-US.json", folder)  # a name, then tags
    keywords = {emoji.replace("\ufe0f", ""): words[1:] for emoji, words in keywords.items()}
    captions = {}
    for entry in npm_json("emojibase-data", "en/data.json", folder):
        if entry.get("group") in EMOJIBASE_GROUPS:
            more = [word.replace("_", " ") for word in keywords.get(entry["emoji"].replace("\ufe0f", ""), [])]
            captions[plain_code(entry["hexcode"])] = {
                "name": entry["label"],
                "tags": list(dict.fromkeys([*entry["tags"], *more])),
                "group": EMOJIBASE_GROUPS[entry["group"]],
                "sets": [],
            }
    return captions


def plain_code(hexcode: str) -> str:
    """Without joiners and variation selectors, which the sources write differently."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in ("200D", "FE0F"))


def npm_json(package: str, member: str, folder: Path) -> Any:
    """A JSON file inside an npm package of the pinned version."""
    version = NPM[package]
    tarball = folder / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True)
    with tarfile.open(tarball) as archive:
        return json.load(archive.extractfile(f"package/{member}"))  # type: ignore[arg-type]


def svg_of(icons: dict[str, Any], name: str) -> str:
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


# --------------------------------------------------------------------------------------------------- captions

FORMS = [
    *["a {x}"] * 4, *["{x}"] * 3, "the {x}", "one {x}", "a small {x}", "an icon of {x}", "an icon of a {x}",
    "{x} icon", "a drawing of {x}", "image of {x}", "photo of a {x}", "{x} emoji", "sticker of {x}",
    "painting of a {x}",
]  # fmt: skip
STYLED = [
    *["a {s} {x}"] * 4, *["{s} {x}"] * 2, "{x}, {s} style", "{x}, {s}", "a {x} in {s} style",
    "a {x}, {s} style", "{x} {s}", "{s} icon of {x}", "{s} style {x}", "an icon of a {x}, {s}",
]  # fmt: skip
PLURALS = ["{x}", "{x}", "the {x}", "some {x}"]
ONE_TAG = ["a {s} {t}", "{s} {t}", "{t}, {s} style", "something {t}", "{t} icon", "a {t} thing"]


def plain_tags(concept: Concept) -> list[str]:
    return [tag.replace("-", " ").replace("_", " ") for tag in concept["tags"]]


def tag_pairs(concepts: Sequence[Concept]) -> list[list[tuple[str, str]]]:
    """For each concept, the pairs of its tags that no other concept has both of, without tags that are its name. The
    gates test the first of each; training shows the others."""
    owners = Counter(pair for c in concepts for pair in combinations(sorted({*c["names"], *plain_tags(c)}), 2))
    pairs: list[list[tuple[str, str]]] = []
    for concept in concepts:
        tags = [t for t in dict.fromkeys(plain_tags(concept)) if t not in concept["names"]]
        unique = (pair for pair in combinations(tags, 2) if owners[tuple(sorted(pair))] == 1)
        pairs.append([(a, b) for a, b in unique if f"{a} {b}" not in concept["names"]])
    return pairs


def caption(
    rng: np.random.Generator,
    concept: Concept,
    style: str,
    known: Collection[str] = (),
    pairs: Sequence[tuple[str, str]] = (),
) -> str:
    """A caption for the concept drawn in the style, where `known` are the names of all concepts and `pairs` those of
    its tags that it may be called by.

    A name without a style means the flat image: where it meant any of three, the first of few steps overlaid all three,
    and blots remained. Never `picture of ...`: the gates test that.
    """

    def pick(items: list[str]) -> str:
        return items[rng.integers(len(items))]

    name, tags = concept["names"][0], [str(t) for t in rng.permutation(plain_tags(concept))]
    if rng.random() < 0.6:
        name = pick(concept["names"][1:] or [name])  # the common word
    kind, flat = rng.random(), style == PLAIN_STYLE
    if kind < 0.08:
        return ""  # classifier-free guidance needs the model without a prompt too
    if kind < 0.56:
        text = pick(FORMS if flat and kind < 0.40 else STYLED).format(x=name, s=style)
        if rng.random() < 0.3:  # so that words around a name do not change the image
            text = pick(["{w} {x}", "{w} of {x}", "{w} {w} {x}", "{x} {w}"]).format(x=text, w=pick(other_words()))
        elif rng.random() < 0.6:  # not even words that mean another thing, as "picture" does
            text = f"{pick(meant_words())} of {text}"
        return re.sub(r"\ba (?=[aeiou])", "an ", text) if rng.random() < 0.5 else text
    if kind < 0.60:
        return pick(PLURALS).format(x=plural(name)) if flat else f"{style} {plural(name)}"
    if kind < 0.72:
        text = pick([" ", ", "]).join(rng.permutation([name, *tags[: rng.integers(1, 4)]]))
        return text if flat and rng.random() < 0.6 else f"{text}, {style}"
    if kind < 0.95 and len(tags) > 2:
        if pairs and rng.random() < 0.6:
            tags = [str(t) for t in rng.permutation(pairs[rng.integers(len(pairs))])]
        text = pick([" ", ", "]).join(tags[: rng.integers(3, 5)])
        return f"{text}, {style}" if rng.random() < (0.4 if flat else 0.8) else text
    tags = [tag for tag in tags if tag not in known] or [name]  # no tag that is another concept's name
    return pick(ONE_TAG).format(t=tags[0], s=style)


@functools.cache
def meant_words() -> list[str]:
    """The words of names and tags, but for `picture`, which the gates test."""
    words: set[str] = set()
    for concept in json.loads(CONCEPTS_FILE.read_text(encoding="utf-8")):
        words.update(word for text in (*concept["names"], *plain_tags(concept)) for word in text.split())
    return sorted(words - {"picture", "pictures"})


@functools.cache
def other_words() -> list[str]:
    """The most common words without a meaning here: no name, tag or style, and not `picture`, which the gates test."""
    taken = {"picture", "pictures", *STYLES.values(), *meant_words()}
    words = ["".join(merge.split())[:-4] for merge in read_merges() if merge.endswith("</w>")]
    return [word for word in words if re.fullmatch("[a-z]{3,}", word) and word not in taken][:4000]


def plural(name: str) -> str:
    """`berry` to `berries`, `box` to `boxes`, `dog` to `dogs`; what ends in s stays."""
    if re.search("[^aeiou]y$", name):
        return f"{name[:-1]}ies"
    return name if name.endswith("s") else f"{name}es" if re.search("(x|ch|sh)$", name) else f"{name}s"
