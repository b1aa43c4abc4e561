import shutil
import stat

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from lavis_kvmod.demo import digits
from lavis_kvmod.system.text_cleaning import one_line
from lavis_kvmod.tasks.caption_tokens import java_problem, simple_tokens, tokenise

HAND_WRITTEN = [
    "A man's dog, running -- fast!",
    "It isn't raining; they're (both) inside: at 5:30.",
    "Two well-known 3.5% cups & a “red” saucer…",
    "You cannot see the cat’s tail?",
    "the dogs' bowl costs $5",
]
# Where the simple tokeniser gives something else: abbreviations, and elided beginnings.
KNOWN_TO_DIFFER = ["the U.S. flag", "'tis a house"]
needs_java = pytest.mark.skipif(java_problem() is not None, reason="no java")


def captions():
    return [digits.caption(scan) for scan in digits.load_scans("test")] + HAND_WRITTEN


@pytest.fixture()
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@needs_java
def test_ptb_is_pycocoevalcaps():
    texts = [*captions(), *KNOWN_TO_DIFFER]
    got = tokenise(texts)
    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert (got.tokeniser, got.reason) == ("ptb", "")
    assert got.captions == [theirs[i][0] for i in range(len(texts))]


@needs_java
def test_the_simple_one_gives_the_same_for_plain_sentences(no_java):
    simple = [" ".join(simple_tokens(one_line(text))) for text in captions() + KNOWN_TO_DIFFER]
    without = tokenise(captions() + KNOWN_TO_DIFFER)
    assert without.captions == simple
    assert (without.tokeniser, without.reason) == ("simple", "there is no java on the PATH")


@needs_java
def test_both_agree_but_for_what_is_documented():
    texts = captions() + KNOWN_TO_DIFFER
    ptb = tokenise(texts).captions
    simple = [" ".join(simple_tokens(one_line(text))) for text in texts]
    differ = [text for text, a, b in zip(texts, ptb, simple) if a != b]
    assert differ == KNOWN_TO_DIFFER


@needs_java
def test_line_breaks_and_empty_captions_do_not_shift_the_others():
    """pycocoevalcap's class gives each caption behind a carriage return that of another."""
    got = tokenise(["", "a\rb", "c\nd", "...", "e\u2028f", "last", ""])
    assert got.captions == ["", "a b", "c d", "", "e f", "last", ""] and got.tokeniser == "ptb"


@pytest.mark.parametrize(
    "script, reason",
    [
        ("exit 1", "java -version ended with status 1"),  # as macOS's, where Java is not installed
        ('[ "$1" = -version ] || { echo broken jar >&2; exit 3; }', "java ended with status 3, gave 0 of 1 lines"),
        ('[ "$1" = -version ]; exit 0', "java ended with status 0, gave 0 of 1 lines"),
    ],
)
def test_a_java_that_does_not_work_is_told(no_java, script, reason):
    java = no_java / "java"
    java.write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\n{script}\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    got = tokenise(["A cat."])
    assert (got.captions, got.tokeniser) == (["a cat"], "simple")
    assert reason in got.reason
