"""`lavis-kvmod app`: the page as Streamlit runs it, and in a real browser."""

import csv
import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from lavis_kvmod.commands import app, cli
from lavis_kvmod.commands.page.batch import MOST_QUESTIONS, answers_table, read_questions


@pytest.fixture(autouse=True)
def _same_main(monkeypatch):
    """The page is run as ``__main__``, which a process that is spawned later would run again."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


@pytest.fixture(scope="module")
def checkpoint(run_folder):
    """A small model's, in the folder of a run."""
    return str(run_folder / "checkpoint_best.pth")


def _page(choices):
    from lavis_kvmod.commands.page.show import show

    show(choices)


def _visit(checkpoint):
    return AppTest.from_function(_page, args=([checkpoint],), default_timeout=60).run()


def test_a_question_is_answered_with_and_without_the_prefix_and_traced(checkpoint):
    page, other = _visit(checkpoint), _visit(checkpoint)
    assert not page.exception and not page.code  # nothing is answered before it is asked
    page.selectbox(key="scan").select("scan 2").run()
    page.checkbox(key="attention").check()
    page.text_input(key="question").input("Which digit is written?")
    page.button[0].click().run()
    assert not page.exception and [c.value for c in page.caption[:2]] == ["with the prefix", "without it"]
    assert len(page.code) == 2 and page.text[0].value == "Which digit is written?"
    assert page.session_state["answer"].attention.startswith(b"\x89PNG")
    page.checkbox(key="without").uncheck()
    page.radio(key="search").set_value("nucleus").run()
    page.text_input(key="question").input("")
    page.button[0].click().run()
    assert len(page.code) == 1 and page.text[0].value == "Caption"
    assert not other.run().code  # another visitor sees nothing of it


def test_what_is_chosen_from_and_where_it_is_served(checkpoint, capsys, tmp_path, monkeypatch):
    assert app.choices([], [checkpoint]) == [checkpoint, "demo"]
    monkeypatch.chdir(tmp_path)
    assert app.choices([], []) == ["demo"]
    assert cli.main(["app", "--checkpoint", "nowhere.pth"]) == 2
    assert "--checkpoint nowhere.pth: no such file" in capsys.readouterr().err
    assert cli.main(["app", "--model-type", "demmo"]) == 2
    assert "expected one of pretrain_opt2.7b" in capsys.readouterr().err
    given = app.server_arguments(8501, "cpu", ["demo"])
    assert given[given.index("--server.address") + 1] == "127.0.0.1" and given[-2:] == ["cpu", "demo"]


def test_a_table_of_questions():
    assert read_questions(b"\xef\xbb\xbfquestion,id\nwhat?,1\n,2\n") == ["what?"]
    assert b"'=1+1" in answers_table([{"question": "=1+1", "prediction": "two"}])
    for data, told in [
        (b"frage\nwas?\n", "the table needs a column named question; it has frage"),
        (b"question\n", "the table has no question"),
        (b"question\n\xff\xfe\n", "not UTF-8"),
        (b"question\n" + b"what?\n" * (MOST_QUESTIONS + 1), "at most 500"),
    ]:
        with pytest.raises(ValueError, match=told.replace(";", ".")):
            read_questions(data)


# ------------------------------------------------------------ in a browser

# `make screenshots` names a trained checkpoint here: the pages' pictures are then made of its answers.
SHOWN = os.environ.get("LAVIS_KVMOD_SCREENSHOTS")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
ANSWERS = "[data-testid=stCode]"


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def address(checkpoint):
    """Where the command serves its page, for the module's tests."""
    port = _free_port()
    command = [sys.executable, "-m", "lavis_kvmod", "app", "--checkpoint", SHOWN or checkpoint, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


class Visitor:
    """A headless Chromium of its own, on the page."""

    def __init__(self, driver, address, downloads):
        self.driver, self.address, self.downloads = driver, address, downloads

    def comes(self):
        """To the page, anew: another session."""
        self.driver.get(self.address)
        assert "Ask about a picture" in self.one("h1").text
        return self

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector, seconds=90):
        """The first that is shown, waited for."""
        return self.until(lambda: next((found for found in self.all(selector) if found.is_displayed()), None), seconds)

    def until(self, something, seconds=90):
        """What ``something`` gives, once it is true; the page may be drawn anew while it is looked at."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                found = something()
            except StaleElementReferenceException:
                found = None
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"not seen in {seconds} s; the page says:\n{self.one('body', 5).text}")

    def text(self):
        return self.driver.find_element("tag name", "body").text

    def uploads(self, path, key="upload"):
        self.until(lambda: self.all(f".st-key-{key} input[type=file]"))[0].send_keys(str(path))

    def chooses(self, scan):
        from selenium.webdriver.common.keys import Keys

        self.one(".st-key-scan input").send_keys(scan, Keys.ENTER)
        self.one("[data-testid=stImage] img")

    def ticks(self, key):
        self.one(f".st-key-{key} label").click()

    def asks(self, question):
        from selenium.webdriver.common.keys import Keys

        field = self.one(".st-key-question input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(question, Keys.ENTER)

    def answers(self, count, question):
        """The texts of that many answers to a question."""
        self.until(lambda: len(self.all(ANSWERS)) == count and question in self.texts_shown() and self.is_still())
        return [found.text for found in self.all(ANSWERS)]

    def texts_shown(self):
        return [found.text for found in self.all("[data-testid=stText]")]

    def is_still(self):
        """Whether the page has been drawn to its end."""
        return bool(self.all("[data-testid=stApp][data-test-script-state=notRunning]"))

    def pictures(self):
        """Those that are there with all their pixels."""
        loaded = "return arguments[0].naturalWidth > 0"
        return [found for found in self.all("[data-testid=stImage] img") if self.driver.execute_script(loaded, found)]

    def tabs_to(self, selector):
        """By the Tab key alone, from where the focus is."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        for _ in range(80):
            ActionChains(self.driver).send_keys(Keys.TAB).perform()
            if self.driver.execute_script("return document.activeElement.matches(arguments[0])", selector):
                return self.driver.switch_to.active_element
        raise AssertionError(f"the Tab key does not lead to {selector}")

    def is_photographed(self, name, down_to):
        """For the pages, if they are to be made."""
        if SHOWN:
            IMAGES.mkdir(exist_ok=True)
            self.driver.execute_script("document.activeElement.blur()")
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'end'})", self.one(down_to))
            time.sleep(1)  # animations end
            picture = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
            picture.quantize(128).save(IMAGES / name, optimize=True)


@pytest.fixture(scope="module")
def visitors(address, tmp_path_factory):
    """Two of them; skipped where there is no Chromium with its driver."""
    webdriver = pytest.importorskip("selenium.webdriver")
    found = []
    try:
        for name in ("first", "second"):
            downloads = tmp_path_factory.mktemp(name)
            options = webdriver.ChromeOptions()
            for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1150"):
                options.add_argument(argument)
            options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
            try:
                found.append(Visitor(webdriver.Chrome(options=options), address, downloads))
            except Exception as error:
                pytest.skip(f"no Chromium with its driver: {type(error).__name__}")
        yield found
    finally:
        for visitor in found:
            visitor.driver.quit()


@pytest.mark.slow
def test_in_chromium_a_question_is_answered_the_prefix_taken_away_and_the_answer_traced(visitors):
    visitor = visitors[0].comes()
    visitor.chooses("scan 2")
    visitor.asks("What colour is the ink?")
    assert len(visitor.answers(2, "What colour is the ink?")) == 2
    assert "with the prefix" in visitor.text() and "without it" in visitor.text()
    visitor.is_photographed("app_answer.png", down_to="[data-testid=stExpander]")
    visitor.ticks("without")
    visitor.asks("Which digit is written?")
    visitor.answers(1, "Which digit is written?")
    assert "without it" not in visitor.text()
    visitor.ticks("attention")
    visitor.asks("What colour is the paper?")
    visitor.answers(1, "What colour is the paper?")
    visitor.until(lambda: len(visitor.pictures()) == 2 and visitor.is_still())  # the scan, and where it looks
    visitor.is_photographed("app_attention.png", down_to="[data-testid=stExpander]")


@pytest.mark.slow
def test_in_chromium_what_is_no_picture_is_a_sentence(visitors, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    for name, told in (("broken.png", "not readable"), ("bomb.png", "pixels")):
        visitor = visitors[0].comes()
        visitor.uploads(tmp_path / name)
        alert = visitor.one("[data-testid=stAlert]").text
        assert name in alert and told in alert and "Traceback" not in visitor.text()
        assert str(tmp_path) not in alert  # the visitor's name for it, and nothing of this machine's
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "photo.png")
    visitor = visitors[0].comes()
    visitor.uploads(tmp_path / "photo.png")
    visitor.one("[data-testid=stImage] img")


@pytest.mark.slow
def test_in_chromium_two_visitors_at_once_see_their_own_answers(visitors):
    first, second = (visitor.comes() for visitor in visitors)
    first.chooses("scan 1")
    second.chooses("scan 3")
    first.asks("Which digit is written?")
    second.asks("What colour is the ink?")  # while the first is being answered
    first.answers(2, "Which digit is written?")
    second.answers(2, "What colour is the ink?")
    assert "What colour is the ink?" not in first.texts_shown()
    assert "Which digit is written?" not in second.texts_shown()


@pytest.mark.slow
def test_in_chromium_the_keyboard_alone_will_do(visitors):
    from selenium.webdriver.common.keys import Keys

    visitor = visitors[1].comes()
    visitor.one(".st-key-scan input")
    visitor.tabs_to(".st-key-scan input").send_keys("scan 2", Keys.ENTER)
    visitor.one("[data-testid=stImage] img")
    visitor.tabs_to(".st-key-question input").send_keys("Which digit is written?")
    visitor.tabs_to("[data-testid=stFormSubmitButton] button").send_keys(Keys.ENTER)
    visitor.answers(2, "Which digit is written?")


@pytest.mark.slow
def test_in_chromium_a_table_of_questions_is_answered_and_downloaded(visitors, tmp_path):
    asked = ["Which digit is written?", "What colour is the ink?", "Is the digit even?"]
    (tmp_path / "questions.csv").write_text("\n".join(["question", *asked]), encoding="utf-8")
    visitor = visitors[0].comes()
    visitor.chooses("scan 2")
    visitor.one("[data-testid=stExpander] summary").click()
    visitor.uploads(tmp_path / "questions.csv", key="table")
    visitor.one(".st-key-answer_all button").click()
    download = visitor.one("[data-testid=stDownloadButton] button")
    visitor.is_photographed("app_table.png", down_to="[data-testid=stDownloadButton]")
    download.click()
    file = visitor.downloads / "answers.csv"
    visitor.until(file.is_file)
    with open(file, encoding="utf-8-sig", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["question"] for row in rows] == asked
    assert all(0 <= float(row["confidence"]) <= 1 and "prediction" in row for row in rows)
