"""The embedded data set: what is committed is what the grammar writes, and the rows are worth training on."""

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.assets import TINY_DATA
from helpers.assets.advertise import SHOWN_PROMPT, Item, content, feature_table, sample_item, summary, write
from helpers.assets.wardrobe import COMMON_FEATURES, GARMENTS, STYLE_KEY, STYLES

KINDS = [(type_, kind) for type_, garment in GARMENTS.items() for kind in garment.kinds]


def rows(name):
    return [json.loads(line) for line in (TINY_DATA / name).read_text(encoding="utf-8").splitlines()]


def test_the_committed_files_are_what_the_grammar_writes(tmp_path):
    write(tmp_path)
    for name in ("train.json", "dev.json"):
        assert (tmp_path / name).read_bytes() == (TINY_DATA / name).read_bytes()


@pytest.mark.parametrize(("name", "at_least"), [("train.json", 2000), ("dev.json", 200)])
def test_rows_have_advertisegens_shape(name, at_least):
    found = rows(name)
    assert len(found) >= at_least
    assert all(list(row) == ["content", "summary"] for row in found)
    names = {kind for _, kind in KINDS}
    pairs = [[pair.split("#") for pair in row["content"].split("*")] for row in found if row["content"] not in names]
    assert len(pairs) > 0.9 * len(found)
    assert all(len(pair) == 2 and pair[0] and pair[1] for row in pairs for pair in row)
    assert all(row[0][0] == "类型" and row[0][1] in GARMENTS for row in pairs)
    assert Counter(row[0][1] for row in pairs).most_common(1)[0][0] == "裙"
    assert all(25 <= len(row["summary"]) <= 100 for row in found)
    assert not any(set(",.:;!?") & set(row["summary"]) for row in found), "Chinese text has full-width punctuation"


def test_dev_rows_are_new():
    train, dev = rows("train.json"), rows("dev.json")
    assert not {row["content"] for row in dev} & {row["content"] for row in train}
    assert len({row["content"] for row in dev}) == len(dev)


def test_every_kind_is_trained_by_its_name_alone():
    contents = {row["content"] for row in rows("train.json")}
    assert {f"类型#{type_}*{GARMENTS[type_].kind_key}#{kind}" for type_, kind in KINDS} <= contents
    assert {kind for _, kind in KINDS} - contents == {SHOWN_PROMPT}


@given(st.integers(0, 2**32 - 1))
def test_an_advertisement_says_every_attribute(seed):
    rng = Random(seed)
    item = sample_item(rng)
    text = summary(item, rng)
    table = feature_table(item.garment)
    assert item.name in text
    for key, value in item.features:
        assert any(clause in text for clause in table[key][value]), (key, value)
    if item.style:
        assert STYLES[item.style].adjective in text
        assert any(closing in text for closing in STYLES[item.style].closing)
    if item.kind:
        assert item.garment.kinds[item.kind].form in text


@given(st.integers(0, 2**32 - 1))
def test_items_make_sense(seed):
    item = sample_item(Random(seed))
    keys = [key for key, _ in item.attributes]
    assert len(set(keys)) == len(keys)
    if item.kind:
        assert not set(item.garment.kinds[item.kind].unused_keys) & set(keys)


@pytest.mark.parametrize(("type_", "kind"), KINDS)
def test_settled_keys_exist(type_, kind):
    assert set(GARMENTS[type_].kinds[kind].unused_keys) <= set(feature_table(GARMENTS[type_]))


def test_another_colour_is_another_advertisement():
    red, blue = (Item("裙", (("颜色", colour), ("裙型", "鱼尾裙"))) for colour in ("红色", "蓝色"))
    assert content(red) == "类型#裙*颜色#红色*裙型#鱼尾裙"
    assert summary(red, Random(0)) != summary(blue, Random(0))


def test_no_key_has_two_meanings():
    for garment in GARMENTS.values():
        assert not set(COMMON_FEATURES) & set(garment.features)
        assert STYLE_KEY not in feature_table(garment)
