"""A server process, and clients that go, stall, lie and flood; signals; and a server that is killed.

A server never answers 500 for what a client did, and afterwards is as it was.
"""

from __future__ import annotations

import base64
import json
import random
import signal
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import clients
import httpx2 as httpx
import pytest
from PIL import Image
from servers import BODY, LONG, Server, metric, wait_until

KEYS = "first-key-1,second-key-2"
OTHER = {"authorization": "Bearer second-key-2"}
OPTIONS = ("--body-timeout", "1", "--max-body", "1", "--max-queue", "24", "--max-input-pixels", "4194304")
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), *OPTIONS, key=KEYS)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def lives(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the server answers, has nothing to do, and has logged nothing that went wrong inside."""
    yield
    if "server" not in request.fixturenames:
        return
    server = request.getfixturevalue("server")
    if server.process.poll() is None:
        server.wait_until_idle()
        assert server.make().status_code == 200
        assert "Traceback" not in server.log.read_text()
        assert server.metric("fastldm_http_requests_total", status="500") == 0


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    content = b""
    try:
        while chunk := connection.recv(65536):
            content += chunk
    except ConnectionResetError:
        pass
    return content


# --- clients that go


def leave(server: Server, seed: int) -> int:
    """A client that goes at a random moment: inside its header, its body, in the queue, while steps are taken, and in
    the middle of the answer; plain and streamed. Its port."""
    r = random.Random(seed)
    fields = {**LONG, "stream": True, "partial_images": 3} if r.random() < 0.5 else LONG
    content = server.request(json.dumps(fields).encode())
    if r.random() < 0.3:
        content = content[: r.randrange(1, len(content))]
    with server.connect() as connection:
        connection.sendall(content)
        time.sleep(r.random() * 0.5)
        if r.random() < 0.5:  # without a good-bye
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return int(connection.getsockname()[1])


def clients_that_go(server: Server, count: int) -> None:
    before = server.metric("fastldm_requests_total", outcome="cancelled")
    completed = server.metric("fastldm_requests_total", outcome="completed")
    with ThreadPoolExecutor(20) as pool:  # so that none finds the queue full
        ports = set(pool.map(lambda seed: leave(server, seed), range(count)))
    server.wait_until_idle()
    wait_until(lambda: not ports & server.ports_of_clients())
    assert server.metric("fastldm_requests_total", outcome="cancelled") - before > count / 3
    assert server.metric("fastldm_requests_total", outcome="completed") - completed < count / 10
    assert server.metric("fastldm_http_requests_total", status="499") > count / 4


def test_clients_that_go_leave_nothing(server: Server) -> None:
    clients_that_go(server, 30)


@pytest.mark.full
def test_300_clients_that_go_leave_memory_flat(server: Server) -> None:
    clients_that_go(server, 100)
    before = server.memory
    clients_that_go(server, 300)
    assert server.memory < 1.03 * before


def test_detached_requests_run_on_without_clients(server: Server) -> None:
    before = server.metric("fastldm_requests_total", outcome="completed")
    with server.connect() as connection:
        body = json.dumps({**BODY, "num_inference_steps": 8}).encode()
        connection.sendall(server.request(body, GENERATIONS, "x-fastldm-detach: 1"))
        wait_until(lambda: server.metric("fastldm_num_running_reqs") == 1)
    wait_until(lambda: server.metric("fastldm_requests_total", outcome="completed") == before + 1)


# --- clients that stall


def test_half_a_header_is_closed(server: Server) -> None:
    start = time.monotonic()
    with server.connect() as silent, server.connect() as half, server.connect() as again:
        half.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nx-slow: ")
        again.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = again.recv(4096)
        assert (answer if b"ok" in answer else answer + again.recv(4096)).startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /health HTT")  # the second request of a connection
        assert [received(one) for one in (silent, half, again)] == [b"", b"", b""]
    assert 0.9 < time.monotonic() - start < 10


def test_a_byte_now_and_then_is_no_header(server: Server) -> None:
    start = time.monotonic()
    with server.connect() as connection:
        wait_until(lambda: server.is_open(connection))  # accepted
        while server.is_open(connection):
            with suppress(OSError):
                connection.sendall(b"G")
            time.sleep(0.1)
            assert time.monotonic() - start < 10
    assert time.monotonic() - start > 0.9


def test_half_a_body_is_408(server: Server) -> None:
    with server.connect() as half, server.connect() as slow:
        half.sendall(server.request(b'{"prompt"', GENERATIONS, "content-length: 100"))
        slow.sendall(server.request(b"", GENERATIONS, "transfer-encoding: chunked"))
        for _ in range(8):
            slow.sendall(b"1\r\n{\r\n")
            time.sleep(0.1)
        for answer in map(received, (half, slow)):
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"body_timeout" in answer
            assert b"x-should-retry: false" in answer


def test_who_does_not_read_is_closed(server: Server) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    asked = (
        f"GET /openapi.json HTTP/1.1\r\nhost: x\r\nauthorization: {server.headers['authorization']}\r\n\r\n".encode()
    )
    with connection:
        connection.settimeout(0.5)
        try:
            for _ in range(400):  # tens of MB of answers, more than the system's buffers take
                connection.sendall(asked)
        except OSError:
            pass
        wait_until(lambda: server.is_open(connection))
        wait_until(lambda: not server.is_open(connection), 20)


# --- clients that send too much


def test_100_mb_bodies_are_413(server: Server) -> None:
    before = server.memory
    for path in (GENERATIONS, EDITS, "/sdapi/v1/txt2img", "/nothing"):
        with server.connect() as connection:  # told before it is sent
            connection.sendall(server.request(b"", path, "content-length: 100000000"))
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    body = b"x" * 100_000_000
    answers = [server.client.post(GENERATIONS, content=body), server.client.post(GENERATIONS, content=iter([body]))]
    assert [answer.status_code for answer in answers] == [413, 413]
    assert answers[0].json()["error"]["code"] == "too_large"
    assert server.memory - before < 50e6


def test_prompts_too_long_are_400(server: Server) -> None:
    for words in (9_000, 900_000):
        answer = server.make(prompt="x" * words)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    answer = server.client.post("/sdapi/v1/txt2img", json={"prompt": "(" * 9_000, "steps": 1})
    assert answer.status_code == 400


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says that it is so large, of these chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


ZEROS = zlib.compress(bytes(100_000_000), 9)  # 97 KB
BOMBS = {
    "declared size": png(60_000, 60_000, (b"IDAT", ZEROS)),
    "declared size without data": png(2**31 - 1, 2**31 - 1),
    "more data than declared": png(8, 8, (b"IDAT", ZEROS)),
    "text": png(8, 8, (b"zTXt", b"Comment\0\0" + ZEROS), (b"IDAT", zlib.compress(bytes(200)))),
    "international text": png(8, 8, (b"iTXt", b"c\0\1\0\0\0" + ZEROS), (b"IDAT", zlib.compress(bytes(200)))),
    "profile": png(8, 8, (b"iCCP", b"p\0\0" + ZEROS), (b"IDAT", zlib.compress(bytes(200)))),
    "gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\0;",
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P6 60000 60000 255\n",
    "tiny": b"\x89PNG",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_400(server: Server, name: str) -> None:
    before, bomb = server.memory, BOMBS[name]
    text = base64.b64encode(bomb).decode()
    harmless = name == "more data than declared"  # the rest is never looked at
    form = {"prompt": "x", "num_inference_steps": "2", "n": "1", "size": "32x32"}
    good = clients.file(Image.new("RGB", (8, 8)))
    answers = [
        server.client.post(EDITS, data=form, files={"image": bomb}),
        server.client.post(EDITS, data=form, files={"image": good, "mask": bomb}),
        server.client.post("/sdapi/v1/img2img", json={"init_images": [text], "steps": 2, "width": 32, "height": 32}),
        server.client.post("/sdapi/v1/png-info", json={"image": text}),
    ]
    assert {answer.status_code for answer in answers} <= ({200, 400} if harmless else {400})
    assert server.memory - before < 64e6


# --- clients that send nonsense


def form_of(image: bytes, boundary: bytes = b"BOUNDARY") -> bytes:
    """A form that is refused at last, for its steps: all of it has been read by then."""
    parts = [(b'name="prompt"', b"x"), (b'name="num_inference_steps"', b"151"), (b'name="adapters[][name]"', b"a")]
    parts += [(b'name="image"; filename="a.png"\r\nContent-Type: image/png', image)]
    body = b"".join(b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary, *part) for part in parts)
    return body + b"--%b--\r\n" % boundary


def mutated(content: bytes, r: random.Random) -> bytes:
    """With some bytes changed, left out or repeated."""
    data = bytearray(content)
    for _ in range(r.randint(1, 4)):
        start = r.randrange(len(data))
        end = min(len(data), start + r.choice([1, 1, 2, 8, 64]))
        piece = bytes(data[start:end])
        pieces = [b"", 2 * piece, r.randbytes(len(piece)), b"\r\n", b"\0", b"--BOUNDARY", b'"', b"{", b"1e999", b"\xff"]
        data[start:end] = r.choice(pieces)
        if not data:
            break
    return bytes(data)


TYPES = ["multipart/form-data; boundary=BOUNDARY"] * 8 + [
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "multipart/form-data; boundary=" + "x" * 300,
    "multipart/form-data; boundary=BOUNDARY; charset=punycode",
    "multipart/form-data; boundary=BOUNDARY; charset=utf-8; charset=undefined",
    "multipart/form-data; boundary=BOUNDARY; charset=utf-16",
    "multipart/mixed; boundary=BOUNDARY",
    "application/x-www-form-urlencoded",
    "application/json",
    "",
]


def test_malformed_forms_are_refused(server: Server) -> None:
    r, statuses = random.Random(0), Counter[int]()
    whole = form_of(clients.file(Image.new("RGB", (16, 16), "red")))
    for k in range(150):
        headers = {"content-type": r.choice(TYPES)}
        answer = server.client.post(EDITS, content=mutated(whole, r) if k else whole, headers=headers)
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, (headers, answer.text)
        assert answer.json()["error"]["message"]
    assert set(statuses) <= {400, 404, 413, 415}
    assert statuses[400] > 50


BODIES = [
    *(b"", b"null", b"[]", b"1", b'"x"', b"{", b'{"prompt":', b"\xff\xfe{", b"\xef\xbb\xbf{}", b"[" * 100_000),
    *(b'{"a":' * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b'{"prompt": "x", "guidance_scale": NaN}'),
    *(b'{"prompt": "x", "guidance_scale": 1e999}', b'{"prompt": "x", "seed": %b}' % (b"9" * 5000)),
    *(b'{"prompt": "x", "size": "9999x9999"}', b'{"prompt": "x", "size": "0x0"}', b'{"image": "\\ud800"}'),
    *(b'{"prompt": "x", "adapters": {"\\ud800": 1}}', b'{"prompt": "x", "sampler": "\\u0000"}'),
    b'{"prompt": "x", "adapters": [{"name": "x", "scale": []}]}',
    *(b'{"prompt": "<lora:x:1e999>", "n": 0}', b'{"prompt": "x", "model": "../../etc/passwd"}'),
    *(b'{"override_settings": {"sd_model_checkpoint": {"a": 1}}}', b'{"override_settings": {"samples_format": [1]}}'),
    *(b'{"override_settings": {"\\ud800": 1}}', b'{"alwayson_scripts": {"\\ud800": {"args": [1]}}}'),
    *(b'{"override_settings": {"CLIP_stop_at_last_layers": 1e300}}', b'{"init_images": ["\\u00e9"]}'),
    *(b'{"init_images": ["data:image/png;base64,"]}', b'{"init_images": ["http://127.0.0.1/"]}'),
]  # fmt: skip


@pytest.mark.parametrize(
    "path", [GENERATIONS, "/v1/jobs", "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options"]
)
def test_malformed_json_is_refused(server: Server, path: str) -> None:
    refused = 0
    for body in BODIES:
        # A second field makes of what some endpoints ignore something that no endpoint runs.
        body = body.replace(b"{", b'{"steps": 151, "num_inference_steps": 151, ', 1) if body.endswith(b"}") else body
        answer = server.client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code < 500, (body[:100], answer.text)
        refused += answer.status_code >= 400
        assert answer.status_code < 400 or answer.json()["error"]
    assert refused >= (len(BODIES) if path != "/sdapi/v1/options" else 10)


def test_what_is_no_http_is_refused(server: Server) -> None:
    r = random.Random(1)
    whole = server.request(b"{}")
    for k in range(20):
        with server.connect() as connection:
            connection.settimeout(5)
            connection.sendall(mutated(whole, r) if k else b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            connection.shutdown(socket.SHUT_WR)
            answer = received(connection)
            assert not answer.startswith(b"HTTP/1.1 5"), answer


# --- clients that flood


def test_a_full_queue_is_429(server: Server) -> None:
    body = json.dumps({**LONG, "size": "96x96"}).encode()
    with ExitStack() as stack:

        def send(count: int) -> None:
            for _ in range(count):
                stack.enter_context(server.connect()).sendall(server.request(body))

        send(12)
        server.wait_until("fastldm_batch_images", 8)  # from here on all wait
        send(24)
        server.wait_until("fastldm_http_requests_total", 1, status="429")
        while server.metric("fastldm_num_queue_reqs") < 24:  # those that were refused together left places
            send(1)
        refused = server.make()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert refused.headers["x-should-retry"] == "true"
        assert server.metric("fastldm_num_queue_reqs") == 24
        assert server.client.get("/health").status_code == 200


def test_one_abort_leaves_all_others(server: Server) -> None:
    """Of a client that goes, of a job that is deleted, and of another key's interrupt."""
    steps = 30
    fields = {**BODY, "num_inference_steps": steps}
    a1111 = {"prompt": "x", "steps": steps, "width": 32, "height": 32}
    with ThreadPoolExecutor(8) as pool, server.connect() as going:
        plain = pool.submit(server.make, num_inference_steps=steps)
        front = pool.submit(server.client.post, "/sdapi/v1/txt2img", json=a1111)
        going.sendall(server.request(json.dumps({**LONG}).encode()))
        kept, deleted = (server.client.post("/v1/jobs", json=fields).json()["id"] for _ in range(2))
        wait_until(lambda: server.metric("fastldm_num_running_reqs") + server.metric("fastldm_num_queue_reqs") == 5)
        assert httpx.delete(f"{server.url}/v1/jobs/{deleted}", headers=OTHER).status_code == 404  # another key's
        assert httpx.post(f"{server.url}/sdapi/v1/interrupt", headers=OTHER).status_code == 200
        assert server.client.delete(f"/v1/jobs/{deleted}").json()["status"] == "cancelling"
        going.close()
        assert len(plain.result().json()["timings"]["steps"]) == steps
        assert json.loads(front.result().json()["info"])["steps"] == steps
        wait_until(lambda: server.client.get(f"/v1/jobs/{kept}").json()["status"] == "completed")
        assert len(server.client.get(f"/v1/jobs/{kept}").json()["result"]["timings"]["steps"]) == steps
        assert server.client.get(f"/v1/jobs/{deleted}").json()["status"] == "cancelled"


def memory_after(server: Server, count: int) -> int:
    """After so many requests of all kinds, by 8 clients."""

    def one(k: int) -> None:
        fields = {"seed": k, "prompt": f"a red apple {k}", "output_format": ["png", "jpeg", "webp"][k % 3]}
        if k % 10 == 0:
            id = server.client.post("/v1/jobs", json={**BODY, **fields}).json()["id"]
            assert server.client.get(f"/v1/jobs/{id}").status_code == 200
        elif k % 10 == 1:
            assert "completed" in server.make(stream=True, **fields).text
        elif k % 10 == 2:
            assert server.make(response_format="url", **fields).json()["data"][0]["url"]
        elif k % 10 == 3:
            assert server.make(n=0).status_code == 400
        else:
            assert server.make(**fields).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(count)))
    server.wait_until_idle()
    return server.memory


def test_requests_leave_memory_flat(server: Server) -> None:
    before = memory_after(server, 20)
    assert memory_after(server, 60) < 1.03 * before


@pytest.mark.full
def test_5000_requests_leave_memory_flat(server: Server) -> None:
    before = memory_after(server, 500)
    assert memory_after(server, 5000) < 1.02 * before


# --- the end


def test_kill_and_restart(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(server.request(json.dumps(LONG).encode()))
        server.wait_until("fastldm_num_running_reqs", 1)
        server.kill()
        assert received(connection) == b""
    again = Server(server.log.parent, *OPTIONS, "--drain", "300", port=server.port, key=KEYS)
    try:
        assert again.make().status_code == 200
        terminate_under_load(again)
    finally:
        again.close()


def terminate_under_load(server: Server) -> None:
    """What is under way ends, be it in the queue; nothing new begins; and all of it is a success."""

    def open_and_done() -> tuple[float, float]:
        text = server.client.get("/metrics").text
        open_ = metric(text, "fastldm_num_running_reqs") + metric(text, "fastldm_num_queue_reqs")
        return open_, metric(text, "fastldm_requests_total", outcome="completed")

    done = open_and_done()[1]
    with ThreadPoolExecutor(12) as pool:
        under_way = [pool.submit(server.make, num_inference_steps=30) for _ in range(10)]
        stream = pool.submit(server.make, num_inference_steps=30, stream=True)
        wait_until(lambda: sum(open_and_done()) == done + 11, 30)
        assert open_and_done()[0]
        server.process.send_signal(signal.SIGTERM)
        refused = 0
        while server.process.poll() is None and not all(one.done() for one in under_way):
            try:
                answer = httpx.post(server.url + GENERATIONS, json=BODY, headers=server.headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
                assert answer.headers["x-should-retry"] == "false"
            except httpx.HTTPError:
                refused += 1
            time.sleep(0.05)
        assert [one.result().status_code for one in under_way] == [200] * 10
        assert "image_generation.completed" in stream.result().text
        assert refused
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    server = Server(tmp_path)
    try:
        with server.connect() as half, ThreadPoolExecutor(4) as pool:
            half.sendall(server.request(b"{", GENERATIONS, "content-length: 100"))
            running = [pool.submit(server.make, **{**LONG, "size": "128x128", "n": 8}) for _ in range(2)]
            server.wait_until("fastldm_num_running_reqs", 1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(40) == 0
            assert time.monotonic() - start < 30  # of a minute for the rest of a body, and of steps
            for one in running:
                answer = one.exception() or one.result()
                assert isinstance(answer, httpx.HTTPError) or answer.status_code == 503
    finally:
        server.close()
