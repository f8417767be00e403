"""The search page: what it answers, what it refuses, what it holds for those who do not see it."""

import http.client
import os
import re
import signal
import socket
import threading
import urllib.parse

import pytest

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
    parts = re.findall(r'<figure class="hit">.*?alt="(.*?)".*?<b>\d+</b> (-?[\d.]+)<br>', page, re.S)
    return {name: float(score) for name, score in parts}


# ---- what it answers ------------------------------------------------------------------------------------------------

def test_a_query(server):
    port, photos, _ = server
    status, headers, body = get(port, "/")
    assert status == 200 and "Find a person in 25 pictures" in body and 'class="hit">' not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "script" not in body
    page = ask(port, q="a man in a red coat", top=7)
    assert page.count('class="hit">') == 7 and 'value="a man in a red coat"' in page and "more like this" in page
    everything = ask(port, q="a man", top=200)
    assert everything.count('class="hit">') == 25 and "&lt;b&gt;&amp;" in everything and "<b>&'" not in everything


def test_more_like_this_begins_with_the_picture_and_leaves_out_the_sentence(server):
    port, _, _ = server
    page = ask(port, q="a man in a red coat", top=5)
    link = re.search(r'href="(/\?like=3[^"]*)"', ask(port, q="a man in a red coat", top=25))[1].replace("&amp;", "&")
    assert "q=" not in link and re.findall(r'href="/\?like=\d+&amp;top=5"', page)
    status, _, like = get(port, link)
    assert status == 200 and like.count('class="hit">') == 25 and "why?" not in like
    assert "<h2>Like 03.png</h2>" in like and list(scores(like))[0] == "03.png"
    assert "00.png" in scores(like) and max(scores(like).values()) < 1.001
    assert ask(port, like=3, top=3).count('class="hit">') == 3


def test_word_maps(server):
    page = ask(server[0], why=3, q="a man in a red coat")
    maps = page.split("What the words respond to in ")[1].split('class="hit"')[0]
    assert maps.count("<figcaption>") == 4 and 'alt="map of the word red"' in maps and "The maps show" in maps


def test_odd_numbers(server):
    port, _, _ = server
    assert get(port, "/?q=a+man&top=")[2].count('class="hit">') == 20                           # the default
    assert ask(port, q="a man", top=0).count('class="hit">') == 1
    assert ask(port, q="a man", top=10 ** 9).count('class="hit">') == 25
    assert ask(port, like=-1).count('class="hit">') == 20                                       # as Python counts
    page = ask(port, q="a man", top="many")
    assert "invalid literal" in page and 'value="a man"' in page and 'class="hit">' not in page


def test_a_query_of_more_than_75_tokens_is_told(server):
    assert "reads the first 75 tokens" in ask(server[0], q="a " * 80)


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
    assert status == 200 and "<main>" in body and "Internal" not in body
    assert "<script>alert" not in body and "<img src=x" not in body
    if not query.strip(". \n\t"):
        assert "escribe the person in a sentence" in body
    elif len(query) > 4000:
        assert "reads the first 75 tokens" in body


@pytest.mark.parametrize("path, status", [
    ("/photo?row=1", 404), ("/secret.png", 404), ("/../secret.png", 404), ("/%2e%2e/secret.png", 404),
    ("//etc/passwd", 404), ("http://[bad/", 404), ("/?like=25", 200), ("/?like=-99", 200), ("/?like=x", 200),
    ("/?like=" + "9" * 5000, 200), ("/?like=../secret.png", 200), ("/?why=99&q=a", 200), ("/?q=" + "a" * 70_000, 414),
], ids=lambda x: str(x)[:24])
def test_nothing_but_rows_can_be_asked_for(server, path, status):
    got, _, page = get(server[0], path)
    assert got == status
    if status == 200:
        assert "class=note" in page and 'class="hit">' not in page


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


def test_a_picture_that_is_gone_is_told(server):
    port, photos, _ = server
    whole = (photos / "07.png").read_bytes()
    (photos / "07.png").unlink()
    try:
        page = ask(port, q="a man", top=200)
        assert page.count('class="hit">') == 25 and page.count("cannot be read any more") == 1
    finally:
        (photos / "07.png").write_bytes(whole)


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
    assert all(f'a coat {n}"' in page and page.count('class="hit">') == 3 for n, page in found.items())
    for s in hanging:
        s.close()


# ---- for everybody --------------------------------------------------------------------------------------------------

def test_every_part_has_a_name(server):
    tags = Tags(ask(server[0], q="a man in a red coat", why=3, top=25))
    assert all(image.get("alt") for image in tags.all("img")) and len(tags.all("img")) > 25
    assert [field["name"] for field in tags.all("input")] == ["q", "top"] and len(tags.all("label")) == 2
    assert len(tags.all("form")) == len(tags.all("main")) == len(tags.all("h1")) == 1


def test_links_are_high_enough():
    assert int(re.search(r"\.hit a {.*?line-height: (\d+)px", evaluation.STYLE)[1]) >= 24
