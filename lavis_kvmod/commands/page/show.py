"""The page: a picture, a question, an answer with its confidence; with and without the prefix, and where it looks.

Everything a visitor gives stays in their session. Models are shared between visitors, one thread at a time.
"""

import io
import math
import threading
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import streamlit as st
from PIL import Image

from lavis_kvmod.commands.asking import TOLD, Asked, load_model
from lavis_kvmod.commands.attend import look
from lavis_kvmod.commands.page.batch import answers_table, read_questions
from lavis_kvmod.datasets.images import read_image

__all__ = ["MOST_MEGABYTES", "MOST_PIXELS", "show"]

MOST_MEGABYTES = 10
MOST_PIXELS = 25_000_000
_SCANS = 6


class Shared(NamedTuple):
    """A loaded model, and what a thread holds while it uses it."""

    asked: Asked
    lock: threading.Lock


@st.cache_resource(max_entries=2, show_spinner="Loading the model")
def _shared(choice: str, device: str) -> Shared:
    is_file = choice.endswith((".pth", ".safetensors"))
    asked = load_model(None if is_file else choice, choice if is_file else None, device)
    return Shared(asked, threading.Lock())


def show(choices: Sequence[str], device: str = "cpu") -> None:
    """Draw the page.

    Args:
        choices: model types and checkpoint files that visitors choose from; they can name no others.
        device: where models are run.
    """
    st.set_page_config(page_title="lavis-kvmod", layout="wide")
    st.title("Ask about a picture")
    choice, search, options = _sidebar(choices)
    if choice == "demo":
        st.info(
            "The demo's parts are pre-trained, its Q-Former is not: after `lavis-kvmod demo` choose its checkpoint."
        )
    left, right = st.columns(2)
    with left:
        image = _told(_picture)
    if image is None:
        with right:
            st.write("Pick a picture, or upload one.")
        return
    with left:
        st.image(image, width=300)
    with right, st.form("ask"):
        question = st.text_input("Question (none: a caption)", key="question", max_chars=500)
        asked = st.form_submit_button("Ask")
    if asked:
        with st.spinner("Looking"):
            st.session_state.answer = _told(lambda: _answer(_shared(choice, device), image, question, search, options))
    with right:
        _show_answer(st.session_state.get("answer"))
    _batch(lambda: _shared(choice, device), image, search)


def _told(make: Callable[[], Any]) -> Any:
    """What ``make`` gives; None, and a sentence on the page, for what the visitor can mend."""
    try:
        return make()
    except TOLD as error:
        st.error(str(error))
        return None


# ------------------------------------------------------------ what is chosen


def _sidebar(choices: Sequence[str]) -> Tuple[str, Dict[str, Any], Dict[str, bool]]:
    with st.sidebar:
        choice = st.selectbox("Model", list(choices), key="model")
        how = st.radio("Search", ["greedy", "beam", "nucleus"], key="search", horizontal=True)
        search: Dict[str, Any] = {"num_beams": 1, "use_nucleus_sampling": how == "nucleus"}
        if how == "beam":
            search["num_beams"] = st.slider("Beams", 2, 10, 5, key="beams")
        if how == "nucleus":
            search["top_p"] = st.slider("Top p", 0.1, 1.0, 0.9, key="top_p")
            search["temperature"] = st.slider("Temperature", 0.1, 2.0, 1.0, key="temperature")
        options = {
            "without": st.checkbox("Also with the prefix taken away", value=True, key="without"),
            "attention": st.checkbox("Where it looks", key="attention"),
        }
    return str(choice), search, options


def _picture() -> Optional[Image.Image]:
    """The visitor's upload, decoded as a data set's images are; else a scan of the demo's.

    Raises:
        BadImageError: for what is no picture, is damaged, or is too large.
    """
    upload = st.file_uploader(f"Picture, up to {MOST_MEGABYTES} MB", key="upload")
    if upload is not None:
        data = upload.getvalue()
        if len(data) > MOST_MEGABYTES * 2**20:
            raise ValueError(f"{upload.name}: more than {MOST_MEGABYTES} MB")
        return read_image(data, max_pixels=MOST_PIXELS, name=upload.name)
    scans = _scans()
    chosen = st.selectbox("or one of these", ["none", *scans], key="scan") if scans else "none"
    return scans[chosen]() if chosen != "none" else None


def _scans() -> Dict[str, Callable[[], Image.Image]]:
    """Some of the demo's scans, by name; none without scikit-learn."""
    try:
        from lavis_kvmod.demo import digits

        scans = digits.load_scans("test")[:_SCANS]
    except ImportError:
        return {}
    return {f"scan {i + 1}": partial(digits.render, scan) for i, scan in enumerate(scans)}


# ------------------------------------------------------------ what is answered


class Shown(NamedTuple):
    """What the page shows of a question: answers by what they were given with, each with its confidence."""

    question: str
    answers: Dict[str, Tuple[str, float]]
    attention: Optional[bytes]


def _answer(
    shared: Shared, image: Image.Image, question: str, search: Dict[str, Any], options: Dict[str, bool]
) -> Shown:
    asked = shared.asked
    with shared.lock:
        samples = asked.samples(image, question)
        has_prefix = asked.model.kv_prefix is not None
        answers = {"with the prefix" if has_prefix else "no prefix": _scored(asked, samples, search)}
        if has_prefix and options["without"]:
            answers["without it"] = _scored(asked, asked.without_prefix(samples), search)
        attention = None
        if options["attention"]:
            sheet, _ = look(asked, image, question, next(iter(answers.values()))[0])
            buffer = io.BytesIO()
            sheet.save(buffer, "PNG")
            attention = buffer.getvalue()
    return Shown(question, answers, attention)


def _scored(asked: Asked, samples: Dict[str, Any], search: Dict[str, Any]) -> Tuple[str, float]:
    said = asked.answer(samples, **search)
    return said.answer, math.exp(min(0.0, said.log_prob))


def _show_answer(shown: Optional[Shown]) -> None:
    if shown is None:
        return
    st.text(shown.question or "Caption")  # st.text and st.code show any text as it is
    for column, (name, (text, confidence)) in zip(st.columns(len(shown.answers)), shown.answers.items()):
        with column:
            st.caption(name)
            st.code(text or "(nothing)", language=None)
            st.progress(confidence, text=f"confidence {confidence:.2f}")
    if shown.attention is not None:
        st.image(shown.attention)


def _batch(shared: Callable[[], Shared], image: Image.Image, search: Dict[str, Any]) -> None:
    """Many questions about the picture, from a table."""
    with st.expander("Many questions, from a table"):
        st.caption("A CSV file with a column named question; all are asked about the picture above.")
        table = st.file_uploader("Table", key="table")
        if table is not None and st.button("Answer all", key="answer_all"):
            with st.spinner("Answering"):
                st.session_state.batch = _told(lambda: _answer_all(shared(), image, table.getvalue(), search))
        rows: Optional[List[Dict[str, Any]]] = st.session_state.get("batch")
        if rows:
            st.dataframe(rows)
            st.download_button("Download the answers", answers_table(rows), "answers.csv", "text/csv")


def _answer_all(shared: Shared, image: Image.Image, table: bytes, search: Dict[str, Any]) -> List[Dict[str, Any]]:
    questions = read_questions(table)
    asked = shared.asked
    rows: List[Dict[str, Any]] = []
    with shared.lock:
        samples = asked.model.encoded(asked.samples(image, questions[0]))  # the picture goes through once
        for question in questions:
            answer, confidence = _scored(asked, {**samples, "text_input": [asked.read(question)]}, search)
            rows.append({"question": question, "prediction": answer, "confidence": round(confidence, 4)})
    return rows
