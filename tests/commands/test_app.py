"""`lavis-kvmod app`: the page as Streamlit runs it, and in a real browser."""

import io
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from lavis_kvmod.commands import app, cli
from lavis_kvmod.commands.page.batch import MOST_QUESTIONS, answers_table, read_questions


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


@contextmanager
def _served(checkpoint, port=8577):
    command = [sys.executable, "-m", "lavis_kvmod", "app", "--checkpoint", checkpoint, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def _browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1600"):
        options.add_argument(argument)
    try:
        driver = webdriver.Chrome(options=options)
    except Exception as error:
        pytest.skip(f"no Chromium with its driver: {type(error).__name__}")
    driver.implicitly_wait(60)
    try:
        yield driver
    finally:
        driver.quit()


def _upload(driver, path):
    driver.find_element("css selector", "input[type=file]").send_keys(str(path))


def _alert(driver):
    return driver.find_element("css selector", "[data-testid=stAlert]").text


@pytest.mark.slow
def test_in_chromium(checkpoint, tmp_path):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    photo = io.BytesIO()
    Image.new("RGB", (60, 40), "teal").save(photo, "PNG")
    (tmp_path / "photo.png").write_bytes(photo.getvalue())
    with _served(checkpoint) as address, _browser() as first, _browser() as second:
        for driver in (first, second):
            driver.get(address)
            assert "Ask about a picture" in driver.find_element("tag name", "h1").text
        _upload(second, tmp_path / "broken.png")
        assert "broken.png" in _alert(second)
        second.refresh()
        _upload(second, tmp_path / "bomb.png")
        assert "bomb.png" in _alert(second) and "pixels" in _alert(second)
        _upload(first, tmp_path / "photo.png")
        question = first.find_element("css selector", "input[aria-label^=Question]")
        question.send_keys("Which digit is written?", Keys.ENTER)  # by the keyboard alone: Enter asks
        assert first.find_element("css selector", "[data-testid=stCode]").is_displayed()
        assert "without it" in first.find_element("tag name", "body").text
        second.implicitly_wait(1)
        assert not second.find_elements("css selector", "[data-testid=stCode]")  # two visitors
