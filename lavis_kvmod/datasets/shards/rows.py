"""What a sample of a shard says: one image, and the questions or captions that belong to it.

=============  =========================================================================================================
``KEY.jpg``    the image (or jpeg, png, webp, bmp, gif, tif, tiff)
``KEY.json``   an annotation, or a list of them: ``question`` with ``answer`` or ``answers`` (one text or several) and
               maybe ``question_id``, ``weight``, ``question_type``, ``answer_type``; or ``caption`` or ``captions``;
               and maybe ``image_id``, ``image`` (a name) and ``source`` (for messages)
``KEY.txt``    a caption, in place of the above or where the JSON has none (as LAION's shards)
=============  =========================================================================================================

Whatever is wrong with a sample becomes a row with a ``problem``: it keeps its place, and what follows keeps its own.
"""

import gzip
import itertools
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Generator, Iterator, List, NamedTuple, Optional, Set, Tuple

from webdataset.handlers import reraise_exception
from webdataset.tariterators import group_by_keys, tar_file_expander

from lavis_kvmod.datasets.cells import has_words, read_text, read_texts, read_weight, said, short
from lavis_kvmod.system.text_cleaning import one_line

__all__ = ["CAPTION", "IMAGE_EXTENSIONS", "VQA", "Kind", "Row", "ends_as_a_tar", "rows_by_sample"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_NEIGHBOURS = "the members of a sample must stand together in the tar, as after tar --sort=name"

# What a tar that was cut short or damaged makes its readers raise.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError)
_BLOCK = 512  # bytes; a tar consists of whole blocks

Annotation = Dict[str, Any]


class Row(NamedTuple):
    """What is trained on or evaluated as one sample.

    Attributes:
        annotation: in the form of `lavis_kvmod.datasets.annotated`, with ``instance_id`` and ``source``.
        image: the image file's bytes.
        image_name: a name that no image of another sample or shard has.
        problem: why it cannot be used, if so; the annotation then holds only ``instance_id`` and ``source``.
    """

    annotation: Annotation
    image: bytes = b""
    image_name: str = ""
    problem: Optional[str] = None


class Kind(NamedTuple):
    """What shards hold.

    Attributes:
        name: ``vqa`` or ``caption``.
        target: the annotation's key for what a model is to say.
        parse: from one entry of the JSON and the sample's text, if it has one, to an annotation.

    Raises (``parse``):
        ValueError: saying what is missing.
    """

    name: str
    target: str
    parse: Callable[[Annotation, Optional[str]], Annotation]


def _samples(path: Path) -> Iterator[Dict[str, Any]]:
    """The samples of a shard, as webdataset groups them: ``__key__``, and bytes by extension.

    Raises:
        FileNotFoundError: if the shard is not there.
        tarfile.TarError, EOFError, zlib.error, ValueError: if it is damaged, after what could be read of it.
    """
    try:
        # webdataset too opens what is compressed, but takes the end of a file that was cut short for the end of a tar.
        stream = gzip.open(path) if _is_compressed(path) else open(path, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no shard {path}; it has been moved or deleted since the data sets were built: put it back"
        ) from error
    with stream:
        members = tar_file_expander([{"url": str(path), "stream": stream}], handler=reraise_exception)
        yield from group_by_keys(members, handler=reraise_exception)
    if not ends_as_a_tar(path):
        raise EOFError("it does not end as a tar does")


def _is_compressed(path: Path) -> bool:
    """Whether a shard is a gzip file, by its name."""
    return path.suffix in (".gz", ".tgz")


def ends_as_a_tar(path: Path) -> bool:
    """Whether a shard ends in two blocks of zeros; one cut short between two members shows by nothing else.

    Compressed ones pass: gzip has an end of its own.
    """
    if _is_compressed(path):
        return True
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 2 * _BLOCK))
        return size % _BLOCK == 0 and file.read() == bytes(2 * _BLOCK)


def rows_by_sample(
    path: Path, kind: Kind, *, per_image: bool = False, needs_target: bool = False
) -> Generator[Tuple[str, List[Row]], None, None]:
    """Key and rows of each sample of a shard, in its order.

    Args:
        path: of the shard.
        kind: `VQA` or `CAPTION`.
        per_image: one row an image with all its captions (evaluation), instead of one for each.
        needs_target: whether a row without answer or caption is wrong.

    Raises:
        FileNotFoundError: if it is not there. What is wrong inside is told by the rows' ``problem``.
    """
    keys: Set[str] = set()
    samples = _samples(path)
    for number in itertools.count():
        try:
            sample = next(samples, None)
        except _DAMAGE as error:
            # webdataset appends the stream to the error's arguments; the first is what was meant.
            reason = str(error.args[0]) if error.args else type(error).__name__
            key = f"{path.name}#{number}"
            yield key, [_broken(key, str(path), f"cut short or damaged after {number} samples ({reason})")]
            return
        if sample is None:
            return
        key = sample["__key__"]
        if key in keys:
            yield key, [_broken(f"{key}#{number}", _source(path, key), "its key has been used before in this shard")]
            continue
        keys.add(key)
        yield key, _rows(sample, path, kind, per_image, needs_target)


def _rows(sample: Dict[str, Any], path: Path, kind: Kind, per_image: bool, needs_target: bool) -> List[Row]:
    """The rows of one sample: at least one, and as many whatever is wrong with some of them."""
    key = sample["__key__"]
    source = _source(path, key)
    try:
        extension = _image_extension(sample)
        text = sample["txt"].decode("utf-8").strip() if "txt" in sample else None
        entries = _entries(sample, text)
    except ValueError as error:  # also what is not UTF-8
        return [_broken(key, source, str(error))]
    rows: List[Row] = []
    for i, entry in enumerate(entries):
        instance_id = key if len(entries) == 1 else f"{key}#{i}"
        annotation = {"image": f"{key}.{extension}", "image_id": key, "source": source}
        if kind == VQA:
            annotation["question_id"] = instance_id
        try:
            annotation.update(_known(entry), **kind.parse(entry, text))
            if needs_target and not annotation.get(kind.target):
                raise ValueError(f"it has no {kind.target}")
        except ValueError as error:
            rows.append(_broken(instance_id, source, str(error)))
            continue
        if entry.get("source"):
            annotation["source"] = f"{source} (from {entry['source']})"
        rows.append(Row({**annotation, "instance_id": instance_id}, sample[extension], f"{path}/{key}.{extension}"))
    if kind == VQA:
        return rows
    return [_merged(rows, key)] if per_image else _one_a_caption(rows, key)


def _merged(rows: List[Row], key: str) -> Row:
    """An image with the captions of all its rows."""
    for row in rows:
        if row.problem:
            return row._replace(annotation={**row.annotation, "instance_id": key})
    captions = [caption for row in rows for caption in row.annotation["caption"]]
    return rows[0]._replace(annotation={**rows[0].annotation, "caption": captions, "instance_id": key})


def _one_a_caption(rows: List[Row], key: str) -> List[Row]:
    """An image as often as it has captions."""
    single = []
    for row in rows:
        captions = row.annotation.get("caption")
        if not captions:
            single.append(row)
        else:
            single += [row._replace(annotation={**row.annotation, "caption": [caption]}) for caption in captions]
    if len(single) == 1:
        return single
    return [row._replace(annotation={**row.annotation, "instance_id": f"{key}#{i}"}) for i, row in enumerate(single)]


def _image_extension(sample: Dict[str, Any]) -> str:
    images = [name for name in IMAGE_EXTENSIONS if name in sample]
    if len(images) != 1:
        found = sorted(name for name in sample if not name.startswith("__"))
        dotted = [name for name in found if name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS and "." in name]
        why = _NEIGHBOURS
        if dotted:
            name = f"{sample['__key__']}.{dotted[0]}"
            better = name.rsplit(".", 1)[0].replace(".", "_")
            why = f"{name} has dots in its name: a key ends at the first; pack it under another name, such as {better}"
        there = short(", ".join(found))
        raise ValueError(f"expected one image, got {len(images)} (under its key there is {there}); {why}")
    return images[0]


def _entries(sample: Dict[str, Any], text: Optional[str]) -> List[Annotation]:
    if "json" not in sample:
        if text is None:
            raise ValueError(f"there is an image, but no .json nor .txt under its key; {_NEIGHBOURS}")
        return [{}]
    try:
        entries = json.loads(sample["json"].decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"its JSON cannot be read: {error}") from None
    entries = entries if isinstance(entries, list) else [entries]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("its JSON should hold an object, or a list of objects")
    return entries


def _broken(instance_id: str, source: str, problem: str) -> Row:
    return Row({"instance_id": instance_id, "source": source}, problem=problem)


def _source(path: Path, key: str) -> str:
    return f"{path}, {key}"


def _known(entry: Annotation) -> Annotation:
    names = ("image", "image_id", "question_id", "question_type", "answer_type")
    return {name: entry[name] for name in names if entry.get(name) is not None}


def _question(entry: Annotation, text: Optional[str]) -> Annotation:
    question = entry.get("question")
    if not isinstance(question, str) or not has_words(question):
        known = ", ".join(sorted(entry)) or "nothing"
        raise ValueError(f"expected a question (a text under 'question'), got {question!r} among {known}")
    question = read_text(question, "question")
    answers = _texts(entry, "answer")
    if answers and not any(answer.strip() for answer in answers):
        raise ValueError(f"all its answers are empty: {answers!r}")
    annotation: Annotation = {"question": question, "answer": answers} if answers else {"question": question}
    weights = entry.get("weight", entry.get("weights"))
    if weights is not None:
        listed = [weights if isinstance(weights, (list, str)) else [weights]]
        annotation["weight"] = [read_weight(weight) for weight in read_texts(listed, "weight")]
        if len(annotation["weight"]) != len(answers):
            raise ValueError(f"expected {len(answers)} weights, one for each answer, got {weights!r}")
        if answers and not sum(annotation["weight"]):
            raise ValueError(f"all its weights are 0: {weights!r}")
    return annotation


def _caption(entry: Annotation, text: Optional[str]) -> Annotation:
    captions = _texts(entry, "caption") or ([] if text is None else [one_line(text)])
    if not all(has_words(caption) for caption in captions):
        raise ValueError(f"one of its captions is empty: {captions!r}")
    return {"caption": captions}


def _texts(entry: Annotation, target: str) -> List[str]:
    found = said(entry, target)
    if isinstance(found, list) and None in found:
        raise ValueError(f"expected each {target} to be a text, got None")
    return read_texts([found], target)


VQA = Kind("vqa", "answer", _question)
CAPTION = Kind("caption", "caption", _caption)
