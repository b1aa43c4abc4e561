"""Captions as words: the Penn Treebank tokeniser that COCO's evaluation uses, or a stand-in where there is no Java.

Both lower-case and drop pycocoevalcap's list of punctuation. Scores from the two do not compare exactly, so whoever
uses them keeps the name of the one that was used.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence

from pycocoevalcap.tokenizer import ptbtokenizer

from lavis_kvmod.system.text_cleaning import one_line

PTB, SIMPLE = "ptb", "simple"

_PUNCTUATION = frozenset(ptbtokenizer.PUNCTUATIONS)
_SAME_AS = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WORD_OR_SIGN = re.compile(r"\w+(?:[-'./,:&]\w+)*|[^\w\s]")
_CONTRACTION = re.compile(r"(.+?)(n't|'(?:s|re|ve|ll|d|m))|(can)(not)")
# Seconds for `java -version`: a machine under load takes a few.
_JAVA_TIMEOUT = 60


class Tokenised(NamedTuple):
    """Captions as space-separated words, which tokeniser made them, and why it was not PTB's."""

    captions: List[str]
    tokeniser: str
    reason: str = ""


def tokenise(captions: Sequence[str]) -> Tokenised:
    """Tokenise with PTB's tokeniser if Java runs here, else with `simple_tokens`."""
    lines = [one_line(caption) for caption in captions]  # a carriage return would shift all captions behind it by one
    reason = java_problem()
    if reason is None:
        try:
            return Tokenised(_ptb(lines), PTB)
        except (OSError, RuntimeError) as error:
            reason = f"PTB's tokeniser failed ({error})"
    return Tokenised([" ".join(simple_tokens(line)) for line in lines], SIMPLE, reason)


def simple_tokens(caption: str) -> List[str]:
    """Lower-cased words without punctuation: what PTB's tokeniser gives for plain sentences.

    Words keep inner hyphens, points, commas, colons, slashes; "don't" is "do n't", "cat's" is "cat 's", "cannot" is
    "can not"; brackets are -lrb- and so on; quotation marks and `PUNCTUATIONS` of pycocoevalcap are dropped. Unlike
    PTB's, it does not know abbreviations ("u.s." loses its last point).
    """
    tokens = []
    for token in _WORD_OR_SIGN.findall(caption.lower().translate(_SAME_AS)):
        parts = _CONTRACTION.fullmatch(token)
        tokens += [part for part in parts.groups() if part] if parts else [_BRACKETS.get(token, token)]
    return [token for token in tokens if token not in _PUNCTUATION and token != '"']


def java_problem() -> Optional[str]:
    """Why no Java program can be run here, or None."""
    return _java_problem(shutil.which("java"))


@functools.lru_cache(maxsize=8)
def _java_problem(java: Optional[str]) -> Optional[str]:
    if java is None:
        return "there is no java on the PATH"
    try:  # macOS has a `java` that only says how to get one
        done = subprocess.run([java, "-version"], capture_output=True, timeout=_JAVA_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{java} does not run ({error})"
    return None if done.returncode == 0 else f"{java} -version ended with status {done.returncode}"


def _ptb(lines: Sequence[str]) -> List[str]:
    """What ``pycocoevalcap.tokenizer.PTBTokenizer`` gives, from the same jar and options.

    That class writes into site-packages, which may be read-only, and takes a tokeniser that failed for one that found
    no words.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    tokenised = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode != 0 or len(tokenised) != len(lines):
        said = (done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(
            f"java ended with status {done.returncode}, gave {len(tokenised)} of {len(lines)} lines and said: {said}"
        )
    return [" ".join(word for word in line.split(" ") if word and word not in _PUNCTUATION) for line in tokenised]
