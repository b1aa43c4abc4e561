"""Answers as VQA's official evaluation compares them."""

from lavis_kvmod.datasets.normalisation import normalise, without_punctuation


def test_case_articles_punctuation_and_number_words_do_not_count():
    assert normalise("A  Cat, two dogs!") == "cat 2 dogs"
    assert normalise("\nThe\tU.S.") == normalise("us")


def test_of_peoples_answers_only_the_punctuation_goes():
    assert without_punctuation("A cat, two dogs!") == "A cat two dogs "
