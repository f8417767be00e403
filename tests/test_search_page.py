"""The search page: what it answers, what it refuses, what it holds for those who do not see it or use no script."""

import http.client
import os
import re
import signal
import socket
import threading
import urllib.parse

import pytest
from PIL import Image

import data
import eval as evaluation
from conftest import start
from gallery import checkpoint                                          # noqa: F401
from test_eval_pages import Tags


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory, people):
    root = tmp_path_factory.mktemp("served")
    photos = root / "photos"
    photos.mkdir()
    for n, r in enumerate(people):
        data.load_image(r["image"]).save(photos / f"{n:02}.png")
    (photos / "<b>&'.png").write_bytes((photos / "00.png").read_bytes())
    Image.new("RGB", (9, 9)).save(root / "secret.png")
    process = start("eval.py", "--checkpoint", checkpoint, "--gallery", photos, "--workers", "0", "--serve", "0")
    said = ""
    while "search page: " not in said:
        said += (line := process.stdout.readline())
        assert line, said
    yield int(said.rsplit("localhost:")[1].split("/")[0]), photos, process
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in said, said


def get(port, path, method="GET", **headers):
    """-> status, headers, body of a request, in an encoding of our own making."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in (dict(Host=f"localhost:{port}") | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode("utf-8", "replace")


def ask(port, **asked):
    """The page for some fields."""
    return get(port, "/?" + urllib.parse.urlencode(asked))[2]


def scores(page):
    """{file name: score} of the pictures on a page."""
    parts = re.findall(r'<figure class=hit>.*?alt="(.*?)".*?<b>\d+</b> (-?[\d.]+)<br>', page, re.S)
    return {name: float(score) for name, score in parts}


# ---- what it answers ------------------------------------------------------------------------------------------------

def test_a_query(server):
    port, photos, _ = server
    status, headers, body = get(port, "/")
    assert status == 200 and "Find a person in 25 pictures" in body and "class=hit>" not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    page = ask(port, q="a man in a red coat", top=7)
    assert page.count("class=hit>") == 7 and "a man in a red coat</textarea>" in page and "more like this" in page
    assert "<title>a man in a red coat - find a person</title>" in page
    everything = ask(port, q="a man", top=200)
    assert everything.count("class=hit>") == 25 and "&lt;b&gt;&amp;" in everything and "<b>&'" not in everything
    status, headers, _ = get(port, "/photo?row=3")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"


def test_several_lines_are_averaged(server):
    one, two, both = (scores(ask(server[0], q=q, top=200)) for q in ("a man", "a red coat", "a man\na red coat"))
    assert len(both) == 25
    ratio = [both[name] / (one[name] + two[name]) for name in both]     # a mean of unit length
    assert max(ratio) - min(ratio) < 0.02


def test_more_like_this_leaves_out_the_picture_and_the_sentence(server):
    port, _, _ = server
    page = ask(port, q="a man in a red coat", top=5)
    link = re.search(r'href="(/\?like=3[^"]*)"', ask(port, q="a man in a red coat", top=25))[1].replace("&amp;", "&")
    assert "q=" not in link and re.findall(r'href="/\?like=\d+&amp;top=5"', page)
    status, _, like = get(port, link)
    assert status == 200 and like.count("class=hit>") == 24 and ">\n</textarea>" in like and "why?" not in like
    name = re.search(r"<h2>Like (.*?)</h2>", like)[1]
    assert re.sub("<.*?>", "", name) == "03.png" and "03.png" not in scores(like)
    assert "00.png" in scores(like) and max(scores(like).values()) < 1.001
    assert ask(port, like=3, top=3).count("class=hit>") == 3


def test_word_maps(server):
    page = ask(server[0], why=3, q="a man in a red coat")
    maps = page.split("What the words respond to in ")[1].split("class=hits")[0]
    assert maps.count("<figcaption>") == 4 and 'alt="map of the word red"' in maps and "The maps show" in maps


def test_an_empty_number_is_the_default(server):
    port, _, _ = server
    status, _, page = get(port, "/?q=a+man&top=")
    assert status == 200 and page.count("class=hit>") == 20 and "a man</textarea>" in page
    status, _, page = get(port, "/?q=a+man&top=0")
    assert status == 400 and "top must be a number from 1 to 200" in page and "a man</textarea>" in page


def test_all_unread_tokens_are_counted(server):
    """Cleaning keeps 77 words, the encoder 75 tokens: of 420 words of one token each 345 are not read."""
    assert "345 tokens were not read" in ask(server[0], q="a " * 420)


# ---- odd queries ----------------------------------------------------------------------------------------------------

ODD = {"empty": "", "blank": "  \n\t ", "long": "a red coat " * 400, "one word of 5,000": "x" * 5000,
       "markup": "<script>alert(1)</script></textarea><img src=x onerror=alert(1)>", "emoji": "🧍🏽‍♀️ in 🟢 🧥",
       "null": "a\0man\0", "controls": "".join(map(chr, range(32))), "right to left": "‮a man",
       "lone surrogate": "%ED%A0%80", "bytes": "%ff%fe", "words of CLIP": "<|endoftext|> <|startoftext|>",
       "format": "{text} {0} %s", "dots": "....", "quote": "'\"`"}


@pytest.mark.parametrize("query", ODD.values(), ids=ODD)
def test_odd_queries_get_an_answer(server, query):
    query_string = query if query.startswith("%") else urllib.parse.quote(query)
    status, headers, body = get(server[0], "/?q=" + query_string)
    assert status in (200, 400) and "<main>" in body and "Internal" not in body
    assert "<script>alert" not in body and "<img src=x" not in body
    nonce = re.search("<script nonce=(.*?)>", body)[1]                  # the script works on every page
    assert len(nonce) == 16 and f"script-src 'nonce-{nonce}'" in headers["Content-Security-Policy"]
    if not query.strip(". \n\t"):
        assert "escribe the person in a sentence" in body
    elif len(query) > 4000:
        assert "tokens were not read" in body


def test_a_query_that_is_too_long_is_refused_in_words(server):
    port, _, _ = server
    status, _, body = get(port, "/?" + urllib.parse.urlencode(dict(q="ä" * 5001)))
    assert status == 400 and "5,001 characters is too long" in body and "ä" * 5001 + "</textarea>" in body
    assert get(port, "/?" + urllib.parse.urlencode(dict(q="字" * 5000)))[0] == 200                       # always fits
    textarea, = Tags(body).all("textarea")
    assert textarea["maxlength"] == "5000"                              # a longer text is cut by the browser


@pytest.mark.parametrize("path, status", [
    ("/photo?row=999", 400), ("/photo?row=-1", 400), ("/photo?row=x", 400), ("/photo?row=" + "9" * 5000, 400),
    ("/photo?row=٣", 400), ("/photo?row=1%00", 400), ("/photo", 404), ("/secret.png", 404), ("/../secret.png", 404),
    ("/photo/../../secret.png", 404), ("/%2e%2e/secret.png", 404), ("//etc/passwd", 404), ("http://[bad/", 400),
    ("/photo?row=../secret.png", 400), ("/?like=25", 400), ("/?like=-1", 400), ("/?like=x", 400),
    ("/?top=0&q=a", 400), ("/?top=1e9&q=a", 400), ("/?top=" + "9" * 5000, 400), ("/?why=99&q=a", 400),
    ("/?" + "a=1&" * 100, 400), ("/?q=" + "a" * 70_000, 414)], ids=lambda x: str(x)[:24])
def test_nothing_but_rows_can_be_asked_for(server, path, status):
    assert get(server[0], path if path.isascii() else urllib.parse.quote(path, safe="/?="))[0] == status


# ---- who is answered ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", ["localhost:{}", "127.0.0.1:{}", "[::1]:{}", "localhost", "127.0.0.1", "LOCALHOST",
                                  "localhost:9000"])                    # through a tunnel: ssh -L 9000:localhost:8000
def test_localhost_is_answered_on_any_port(server, host):
    assert get(server[0], "/", Host=host.format(server[0]))[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "localhost:{}.evil.example", "", "localhost:",
                                  "localhost.evil.example", "evil-localhost", "localhost:80@evil.example", "[::2]"])
def test_other_names_are_refused(server, host):
    assert get(server[0], "/", Host=host.format(server[0]))[0] == 403


def test_other_methods_and_addresses(server):
    port, _, _ = server
    assert get(port, "/", method="POST")[0] == 501
    others = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:                                              # bound to the loopback address alone
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2)


def test_a_picture_that_became_a_link_is_not_shown(server):
    port, photos, _ = server
    row = next(n for n in range(25) if 'alt="07.png"' in ask(port, like=(n + 1) % 25, top=200)
               and "Like <span class=ending>07.png" in ask(port, like=n))
    whole = (photos / "07.png").read_bytes()
    (photos / "07.png").unlink()
    try:
        for _ in range(2):
            assert get(port, f"/photo?row={row}")[0] == 400
            assert "07.png cannot be read any more" in ask(port, q="a man", top=200)
            (photos / "07.png").unlink(missing_ok=True)
            (photos / "07.png").symlink_to(photos.parent / "secret.png")
    finally:
        (photos / "07.png").unlink()
        (photos / "07.png").write_bytes(whole)
    assert get(port, f"/photo?row={row}")[0] == 200


def test_many_clients_and_some_that_hang(server):
    port, _, _ = server
    hanging = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    for s in hanging[:4]:
        s.sendall(b"GET / HTTP/1.1\r\nHost: local")
    gone = socket.create_connection(("127.0.0.1", port))
    gone.sendall(f"GET /?q=a HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
    gone.close()
    found = {}

    def client(n):
        found[n] = ask(port, q=f"a man in a coat {n}", top=3)
    threads = [threading.Thread(target=client, args=(n,)) for n in range(32)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(found) == 32
    assert all(f"a coat {n}</textarea>" in page and page.count("class=hit>") == 3 for n, page in found.items())
    for s in hanging:
        s.close()


# ---- for everybody --------------------------------------------------------------------------------------------------

def test_every_part_has_a_name(server):
    tags = Tags(ask(server[0], q="a man in a red coat", why=3, top=25))
    assert all(image.get("alt") for image in tags.all("img")) and len(tags.all("img")) > 25
    labelled = {label.get("for") for label in tags.all("label")}
    assert {a["id"] for a in tags.all("textarea")} <= labelled
    assert len(tags.all("header")) == len(tags.all("main")) == len(tags.all("h1")) == 1


def test_links_are_high_enough():
    assert int(re.search(r"\.more a {{.*?line-height: (\d+)px", evaluation.PAGE)[1]) >= 24


@pytest.mark.parametrize("name, want", [("a/0003_c2.png", 'a/000<span class=ending>3_c2.png</span>'),
                                        ("<x>.jpg", '<span class=ending>&lt;x&gt;.jpg</span>')])
def test_a_name_is_not_broken_in_its_ending(name, want):
    assert evaluation.breakable(name) == want
    assert re.search(r"\.ending {[^}]*white-space: nowrap", evaluation.STYLE)


def test_the_browser_loads_the_pages(server):
    """No script fetches them, so errors and titles are the browser's own. What is typed meanwhile is kept."""
    _, headers, page = get(server[0], "/")
    assert "fetch(" not in page and "connect-src" not in headers["Content-Security-Policy"]
    assert [form["method"] for form in Tags(page).all("form")] == ["get"]
    assert "onbeforeunload" in page and "sessionStorage.typed = text.value" in page
