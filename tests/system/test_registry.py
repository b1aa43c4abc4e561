"""Names that stand for parts."""

import pytest

from lavis_kvmod.system.registry import Registry


@pytest.fixture()
def fruit():
    registry = Registry("fruit", "fruit_of_the_day")
    registry.register("apple", 1)
    registry.register("pear", 2)
    registry.register("berry:", 3, members=lambda: ["straw", "rasp"])
    return registry


def test_a_name_or_a_member_of_a_family(fruit):
    assert fruit["apple"] == 1 and fruit["berry:rasp"] == 3
    assert "pear" in fruit and "berry:straw" in fruit
    for unknown in ("plum", "berry:blue", "berry:", "nut:wal", None, 7):
        assert unknown not in fruit
    assert list(fruit) == ["apple", "pear", "berry:"] and len(fruit) == 3


def test_register_as_a_decorator(fruit):
    @fruit.register("plum")
    def plum():
        return 4

    assert fruit["plum"] is plum and plum() == 4


def test_unknown_and_taken_names_list_what_there_is(fruit):
    with pytest.raises(ValueError, match="fruit_of_the_day: expected one of apple, pear, berry:NAME; got 'aple'; did"):
        fruit["aple"]
    with pytest.raises(ValueError, match="got 'berry:starw'; did you mean berry:straw?"):
        fruit["berry:starw"]
    with pytest.raises(ValueError, match="got 3$"):
        fruit[3]
    with pytest.raises(ValueError, match="fruit 'pear' is there already, take another name; there are apple, pear, be"):
        fruit.register("pear", 5)
    with pytest.raises(ValueError, match="ends in a colon"):
        fruit.register("nut:", 5)
    with pytest.raises(ValueError, match="expected a name, got ''"):
        fruit.register("", 5)


def test_search(fruit):
    assert fruit.search() == ["apple", "pear", "berry:NAME"]
    assert fruit.search("*r*") == ["pear", "berry:straw", "berry:rasp"]
    assert fruit.search("berry:s*") == ["berry:straw"]
    assert fruit.search("x*") == []
