"""The page that --web serves."""

import io
import json
import secrets
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from PIL import Image

from .inputs import read_photo
from .utils import shown


def thumbnail(path, size=320):
    """JPEG of at most `size` pixels a side; grey where the photo is unreadable by now."""
    try:
        image = read_photo(path, at_least=size)
    except Exception:  # deleted or damaged since it was indexed
        image = Image.new("RGB", (size, size), "lightgrey")
    image.thumbnail((size, size))
    image.save(jpeg := io.BytesIO(), "JPEG", quality=85)
    return jpeg.getvalue()


def server(index):
    """A page for `index` on this machine -> (server to `serve_forever()`, its address).

    The address holds a secret: without it, other users of the machine and web sites open in the
    same browser get nothing. It serves photos that were found, and only as JPEG files of its own.
    """
    secret, lock, numbers = secrets.token_urlsafe(), threading.Lock(), {}  # path -> number
    start = Path(__file__).with_name("web.html").read_text("utf-8").replace("NONCE", secret)

    def search(text="", without="", like="", top="24"):
        photos = []
        with lock:
            index.report = (notes := []).append  # shown on the page
            image = dict(enumerate(numbers))[int(like)] if like else None
            for path, score in index.search(text, int(top), image, without):
                name = shown(path.relative_to(index.folder))
                number = numbers.setdefault(path, len(numbers))
                photos.append({"number": number, "name": name, "score": score})
        return "application/json", json.dumps({"notes": notes, "photos": photos}).encode()

    def photo(number, size):
        if int(size) < 1:
            raise ValueError
        return "image/jpeg", thumbnail(dict(enumerate(numbers))[int(number)], min(int(size), 2000))

    answers = {"search": search, "photo": photo}
    answers[""] = lambda: ("text/html; charset=utf-8", start.encode())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            try:
                url = urlsplit(self.path)
                key, _, name = url.path[1:].partition("/")
                if not secrets.compare_digest(key.encode(), secret.encode()):
                    raise KeyError
                kind, content = answers[name](**dict(parse_qsl(url.query)))
            except (LookupError, TypeError, ValueError):
                return self.send_error(404)
            with suppress(ConnectionError):  # while the user types, the page drops old answers
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            """Nothing: a line would show the secret."""

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    return served, f"http://127.0.0.1:{served.server_port}/{secret}/"
