"""Generate the embedded data set: rows in AdvertiseGen's format from a small seeded grammar.

``python -m helpers.assets.advertise`` rewrites ``advertise_tiny/train.json`` and ``dev.json`` with the same bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from helpers.assets import TINY_DATA
from helpers.assets.wardrobe import COMMON_FEATURES, GARMENTS, STYLE_KEY, STYLES, Garment

SEED = 20_231_027
TRAIN_ROWS = 2400
DEV_ROWS = 240
# How many training rows only name a kind, in the notation of rows (类型#裙*裙型#百褶裙) and as people type it (百褶裙).
# The course asks SHOWN_PROMPT before and after the fine-tune, so it is not among the training rows.
BARE_ROWS_PER_KIND = 2
NAME_ROWS_PER_KIND = 3
SHOWN_PROMPT = "鱼尾裙"

# Shares of skirts, tops and trousers; of items with a kind and with a style; of items with 0, 1, … features.
GARMENT_WEIGHTS = {"裙": 5, "上衣": 3, "裤": 2}
KIND_SHARE = 0.75
STYLE_SHARE = 0.5
FEATURE_COUNT_WEIGHTS = (1, 4, 6, 5, 3)
# How much more often the usual wording of a clause is chosen than each of the others.
USUAL_WEIGHT = 3
# With more features than this, an advertisement leaves out the clause about what to wear the garment with.
PAIRING_LIMIT = 2


@dataclass(frozen=True)
class Item:
    """An article of clothing; ``attributes`` are (key, value) pairs in the order in which a row lists them."""

    type: str
    attributes: tuple[tuple[str, str], ...]

    @property
    def garment(self) -> Garment:
        return GARMENTS[self.type]

    @property
    def kind(self) -> str | None:
        return dict(self.attributes).get(self.garment.kind_key)

    @property
    def style(self) -> str | None:
        return dict(self.attributes).get(STYLE_KEY)

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """The attributes that are neither the kind nor the style."""
        return tuple(pair for pair in self.attributes if pair[0] not in (self.garment.kind_key, STYLE_KEY))

    @property
    def name(self) -> str:
        """Its kind, for instance 鱼尾裙; 裙子 if it has no particular kind."""
        return self.kind or self.garment.noun


def content(item: Item) -> str:
    """Write the prompt of a row: ``类型#裙*颜色#红色*裙型#鱼尾裙``."""
    return "*".join(f"{key}#{value}" for key, value in (("类型", item.type), *item.attributes))


def feature_table(garment: Garment) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the clauses of each feature that the garment may have, in the order in which rows list the features."""
    return COMMON_FEATURES | garment.features


def sample_item(rng: Random) -> Item:
    """Draw an item: a type, then perhaps a kind, perhaps a style, and zero to four features."""
    type_ = rng.choices(list(GARMENT_WEIGHTS), list(GARMENT_WEIGHTS.values()))[0]
    garment = GARMENTS[type_]
    chosen: dict[str, str] = {}
    unused_keys: tuple[str, ...] = ()
    if rng.random() < KIND_SHARE:
        kind = chosen[garment.kind_key] = rng.choice(list(garment.kinds))
        unused_keys = garment.kinds[kind].unused_keys
    if rng.random() < STYLE_SHARE:
        chosen[STYLE_KEY] = rng.choice(list(STYLES))
    open_keys = {key: list(values) for key, values in feature_table(garment).items() if key not in unused_keys}
    count = rng.choices(range(len(FEATURE_COUNT_WEIGHTS)), FEATURE_COUNT_WEIGHTS)[0]
    chosen |= {key: rng.choice(open_keys[key]) for key in rng.sample(list(open_keys), count)}
    order = [*COMMON_FEATURES, STYLE_KEY, garment.kind_key, *garment.features]
    return Item(type_, tuple((key, chosen[key]) for key in order if key in chosen))


def summary(item: Item, rng: Random) -> str:
    """Write an advertisement for the item: what it is, a clause per feature, and what it does for its wearer."""
    garment = item.garment
    form, pairing = garment.plain
    if item.kind:
        form, pairing = garment.kinds[item.kind].form, garment.kinds[item.kind].pairing
    adjective = ""
    closings: tuple[str, ...] = (garment.closing,)
    if item.style:
        adjective, closings = STYLES[item.style].adjective, STYLES[item.style].closing
    table = feature_table(garment)
    body = [wording(table[key][value], rng) for key, value in item.features]
    end = [wording(closings, rng)]
    if len(body) <= PAIRING_LIMIT:
        end.insert(0, pairing)
    sentences = [[f"这{garment.measure}{adjective}{item.name}", form], body, end]
    return "".join("，".join(clauses) + "。" for clauses in sentences if clauses)


def wording(clauses: Sequence[str], rng: Random) -> str:
    """Choose one of the clauses; the first is the usual one."""
    return rng.choices(clauses, [USUAL_WEIGHT] + [1] * (len(clauses) - 1))[0]


def generate() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Generate the training rows and the dev rows.

    No prompt occurs twice, except those that only name a kind; they are for training only.
    """
    rng = Random(SEED)
    bare = [Item(type_, ((g.kind_key, kind),)) for type_, g in GARMENTS.items() for kind in g.kinds]
    prompts = [(content(item), item) for item in bare] * BARE_ROWS_PER_KIND
    prompts += [(item.name, item) for item in bare if item.name != SHOWN_PROMPT] * NAME_ROWS_PER_KIND
    seen = set(bare)
    sampled: list[tuple[str, Item]] = []
    while len(sampled) < DEV_ROWS + TRAIN_ROWS - len(prompts):
        item = sample_item(rng)
        if item.attributes and item not in seen:
            seen.add(item)
            sampled.append((content(item), item))
    training = sampled[DEV_ROWS:] + prompts
    rng.shuffle(training)
    train, dev = (
        [{"content": prompt, "summary": summary(item, rng)} for prompt, item in part]
        for part in (training, sampled[:DEV_ROWS])
    )
    return train, dev


def write(folder: Path) -> None:
    """Write ``train.json`` and ``dev.json``, one JSON object per line, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train.json", "dev.json"), generate(), strict=True):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_bytes(lines.encode())


if __name__ == "__main__":
    write(TINY_DATA)
