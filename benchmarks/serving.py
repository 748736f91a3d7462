"""`fastldm serve` under its real client, and beside the server that people write around diffusers.

    python -m benchmarks.serving                           all parts, some twenty minutes on two cores; not kept
    python -m benchmarks.serving --rounds 5 --keep         into the history of benchmarks/suite.py
    python -m benchmarks.serving --part overhead --quick   a part, with few requests, to see that it runs

AsyncOpenAI sends to server processes of the default model on a CPU, of which one at a time has work; contenders take
turns within a round, figures are medians over rounds, and latencies are of the requests of all rounds:

    comparison  1, 8 and 64 clients, each with its next request when it has an answer: fastldm, and
                benchmarks/diffusers_server.py in float32 and bfloat16; the same requests of one kind (64x64, 8 steps),
                then mixed: sizes, steps, guidance, and samplers and adapters, which that server ignores
    overhead    one request at a time: a Session in a process of its own, and the same request over HTTP, by the openai
                client and by Python's http.client; the time of encoding is the server's own metric
    batch       --max-batch 4, 8 and 16, at 8 and at 64 clients
    streams     8 clients: plain answers, streams without previews, and with three

What other processes took of the cores meanwhile is in the record as `others`: on a quiet machine about 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("diffusers float32", "diffusers bfloat16")
PARTS = ("comparison", "overhead", "batch", "streams")
PROMPTS = ("a red apple", "a 3d rocket", "a flat guitar", "a noto cat", "a green tree", "a house with a garden")
SAMPLERS = ("ddim", "euler", "euler a", "dpm++ 2m karras", "unipc", "heun")
ADAPTERS = ({}, {}, {"sketch": 0.8}, {"pixel": 1.0})
IN_PROCESS = """
import json, sys
from time import perf_counter
from fastldm import heap
heap.keep()
import fastldm
from fastldm.adapters.locate import find_weights
pipe = fastldm.Pipeline.default(device="cpu")
for name in ("sketch", "pixel"):
    pipe.load_lora_weights(find_weights(name, kind="lora"), adapter_name=name)
pipe.set_adapters([])
with fastldm.Session(pipe, max_batch=8) as session:
    for line in sys.stdin:
        start = perf_counter()
        session.submit(**json.loads(line)).result()
        print(perf_counter() - start, flush=True)
"""

Body = dict[str, Any]
"""Arguments of `client.images.generate`."""


# --- requests


def of_one_kind(k: int) -> Body:
    fields = {"seed": k, "num_inference_steps": 8, "guidance_scale": 2.0}
    return {"prompt": PROMPTS[k % len(PROMPTS)], "size": "64x64", "extra_body": fields}


def mixed(k: int) -> Body:
    pick = random.Random(k).choice
    fields = {"seed": k, "sampler": pick(SAMPLERS), "num_inference_steps": pick((4, 6, 8, 12))}
    fields |= {"guidance_scale": pick((1.0, 2.0, 4.0)), "adapters": pick(ADAPTERS)}
    return {"prompt": pick(PROMPTS), "size": pick(("64x64", "64x64", "96x64", "64x96")), "extra_body": fields}


KINDS = {"one kind": of_one_kind, "mixed": mixed}


# --- servers


class Server(NamedTuple):
    """A server process that is up."""

    url: str
    process: psutil.Process


@contextlib.contextmanager
def started(command: Sequence[str], **environment: str) -> Iterator[Server]:
    """A server, which is ready inside. RuntimeError with its last words where it does not start."""
    env = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", *command], env=env, cwd=ROOT, stdout=said, stderr=said)
        try:
            yield Server(_url(process, said), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def _url(process: subprocess.Popen[bytes], said: Any) -> str:
    """Where a server says that it is, when it answers."""
    while process.poll() is None:
        said.seek(0)
        found = re.search(r"http://[\d.]+:\d+", said.read())
        if found:
            with contextlib.suppress(OSError):
                path = "/ready" if "fastldm" in process.args else "/openapi.json"  # type: ignore[operator]
                urllib.request.urlopen(found[0] + path).close()
                return found[0]
        time.sleep(0.1)
    said.seek(0)
    raise RuntimeError(f"a server did not start:\n{said.read()[-2000:]}")


def fastldm_server(*options: str) -> contextlib.AbstractContextManager[Server]:
    adapters = ("--lora", "sketch", "--lora", "pixel")
    return started(["fastldm", "serve", "--port", "0", "--device", "cpu", "--log", "off", *adapters, *options])


def diffusers_server(dtype: str) -> contextlib.AbstractContextManager[Server]:
    return started(["uvicorn", "benchmarks.diffusers_server:app", "--port", "0", "--no-access-log"], DTYPE=dtype)


# --- clients


class Load(NamedTuple):
    """What clients saw, and the seconds of cores that the server took, which a busy machine changes least."""

    seconds: float
    latencies: list[float]
    cores: float


async def _send(url: str, bodies: Sequence[Body], clients: int) -> tuple[float, list[float]]:
    """Each client has its next request when it has an answer. Any error ends it."""
    from openai import AsyncOpenAI

    latencies: list[float] = []
    pending = iter(bodies)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def work() -> None:
            for body in pending:
                start = perf_counter()
                answer = await client.images.generate(**body)
                if body.get("stream"):
                    events = [event async for event in answer]
                    assert events[-1].type == "image_generation.completed", events[-1]
                else:
                    assert answer.data[0].b64_json
                latencies.append(perf_counter() - start)

        start = perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        return perf_counter() - start, latencies


def send(server: Server, bodies: Sequence[Body], clients: int) -> Load:
    before = sum(server.process.cpu_times()[:2])
    seconds, latencies = asyncio.run(_send(server.url, bodies, clients))
    return Load(seconds, latencies, sum(server.process.cpu_times()[:2]) - before)


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank."""
    return sorted(values)[max(0, -(-percent * len(values) // 100) - 1)]


def row(loads: Sequence[Load], **what: Any) -> dict[str, Any]:
    """Latencies in ms, pictures a second as the median over rounds, with the least and the most."""
    latencies = [latency for load in loads for latency in load.latencies]
    rates = [len(load.latencies) / load.seconds for load in loads]
    ms = {f"p{percent} ms": round(1000 * percentile(latencies, percent), 1) for percent in (50, 95, 99)}
    spread = [round(rate, 2) for rate in (min(rates), max(rates))]
    cores = round(sum(load.cores for load in loads) / len(latencies), 3)
    figures = {"pictures/s": round(median(rates), 2), "spread": spread, **ms, "core s a picture": cores}
    return {**what, **figures, "requests": len(latencies)}


def say(figures: dict[str, Any]) -> None:
    print("  ".join(f"{name} {value}" for name, value in figures.items()), file=sys.stderr, flush=True)


class Others:
    """What processes other than these took of the cores since it was made, as a fraction of their time."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._processes = [psutil.Process(), *(server.process for server in servers)]
        self._before = self._times()

    def _times(self) -> tuple[float, float, float]:
        """(all, busy, ours)"""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        return sum(times[:8]), sum(times[:8]) - idle, sum(sum(p.cpu_times()[:2]) for p in self._processes)

    def fraction(self) -> float:
        everything, busy, ours = (b - a for a, b in zip(self._before, self._times(), strict=True))
        return round(max(0.0, busy - ours) / everything, 3)


# --- parts


Part = dict[str, Any]


def in_turns(servers: dict[str, Server], settings: Sequence[tuple[str, int, int]], rounds: int) -> list[dict[str, Any]]:
    """Rows of all servers. settings: (kind of requests, clients, requests)"""
    loads: dict[tuple[str, str, int], list[Load]] = {}
    numbers = itertools.count()
    for name, server in servers.items():
        for kind in dict.fromkeys(kind for kind, *_ in settings):
            send(server, [KINDS[kind](k) for k in range(16)], 8)  # warms it up
        say({"warm": name})
    for _ in range(rounds):
        for kind, clients, count in settings:
            bodies = [KINDS[kind](next(numbers)) for _ in range(count)]
            for name, server in servers.items():
                load = send(server, bodies, clients)
                loads.setdefault((kind, name, clients), []).append(load)
                say(row([load], server=name, kind=kind, clients=clients))
    return [row(value, kind=kind, server=name, clients=clients) for (kind, name, clients), value in loads.items()]


def comparison(rounds: int, quick: bool) -> Part:
    counts = ((1, 2), (8, 8)) if quick else ((1, 8), (8, 32), (64, 64))
    with contextlib.ExitStack() as stack:
        servers = {"fastldm": stack.enter_context(fastldm_server())}
        servers |= {name: stack.enter_context(diffusers_server(name.split()[1])) for name in PEERS}
        others = Others([*servers.values()])
        settings = [(kind, clients, count) for kind in KINDS for clients, count in counts]
        rows = in_turns(servers, settings, rounds)
        return {"table": rows, "others": others.fraction()}


def batch(rounds: int, quick: bool) -> Part:
    counts = ((8, 16),) if quick else ((8, 32), (64, 64))
    with contextlib.ExitStack() as stack:
        servers = {f"max batch {b}": stack.enter_context(fastldm_server("--max-batch", str(b))) for b in (4, 8, 16)}
        others = Others([*servers.values()])
        settings = [(kind, clients, count) for kind in KINDS for clients, count in counts]
        rows = in_turns(servers, settings, rounds)
        return {"table": rows, "others": others.fraction()}


def streams(rounds: int, quick: bool) -> Part:
    contenders = {
        "plain": {},
        "stream": {"stream": True},
        "stream, 3 previews": {"stream": True, "partial_images": 3},
    }
    loads: dict[str, list[Load]] = {name: [] for name in contenders}
    with fastldm_server() as server:
        send(server, [of_one_kind(k) for k in range(16)], 8)
        others = Others([server])
        for _ in range(rounds):
            for name, fields in contenders.items():
                bodies = [of_one_kind(k) | fields for k in range(8 if quick else 48)]
                loads[name].append(send(server, bodies, 8))
        rows = [row(value, answer=name, clients=8) for name, value in loads.items()]
        for figures in rows:
            say(figures)
        return {"table": rows, "others": others.fraction()}


def overhead(rounds: int, quick: bool) -> Part:
    """Medians in ms."""
    times: dict[str, list[float]] = {name: [] for name in ("in process", "openai client", "http.client", "session")}
    with fastldm_server() as server, _in_process() as child:
        others = Others([server, Server("", psutil.Process(child.pid))])
        asyncio.run(_paired(server, child, 5, {name: [] for name in times}))  # warms up
        before = _encoding(server)
        for _ in range(rounds):
            asyncio.run(_paired(server, child, 4 if quick else 40, times))
        encoded = [b - a for a, b in zip(before, _encoding(server), strict=True)]
        ms = {name: round(1000 * median(values), 2) for name, values in times.items()}
        ms["encoding"] = round(1000 * encoded[0] / encoded[1], 2)
        # Of pairs of neighbours, as the machine's speed wanders.
        for name in ("openai client", "http.client"):
            added = median(a - b for a, b in zip(times[name], times["in process"], strict=True))
            ms[f"{name} adds"] = round(1000 * added - ms["encoding"], 2)
        around = median(a - b for a, b in zip(times["openai client"], times["session"], strict=True))
        ms["around the session, openai client"] = round(1000 * around - ms["encoding"], 2)
        say(ms)
        return {"ms": ms, "requests": len(times["in process"]), "others": others.fraction()}


@contextlib.contextmanager
def _in_process() -> Iterator[subprocess.Popen[str]]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", IN_PROCESS], env=env, text=True, **pipes) as child:  # type: ignore[call-overload]
        yield child
        assert child.stdin is not None
        child.stdin.close()


async def _paired(server: Server, child: subprocess.Popen[str], count: int, times: dict[str, list[float]]) -> None:
    """The same request by each way, one after the other, so many times."""
    from openai import AsyncOpenAI

    assert child.stdin is not None
    assert child.stdout is not None
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for k in range(count):
            body = of_one_kind(k)
            fields = {"prompt": body["prompt"], **body["extra_body"]}
            child.stdin.write(json.dumps({**fields, "width": 64, "height": 64}) + "\n")
            child.stdin.flush()
            times["in process"].append(float(child.stdout.readline()))

            start = perf_counter()
            answer = await client.images.generate(**body)
            times["openai client"].append(perf_counter() - start)
            times["session"].append(answer.model_extra["timings"]["total"])

            connection.close()
            connection.connect()  # again: the server does not keep silent ones for long
            start = perf_counter()
            content = json.dumps({**fields, "size": "64x64"})
            connection.request("POST", "/v1/images/generations", content, {"content-type": "application/json"})
            answered = connection.getresponse()
            json.loads(answered.read())
            times["http.client"].append(perf_counter() - start)
            assert answered.status == 200
    connection.close()


def _encoding(server: Server) -> tuple[float, float]:
    """(seconds, answers), as the server has counted them."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()
    found = [
        re.search(rf"^fastldm_encode_time_seconds_{name}\S* (\S+)", text, re.MULTILINE) for name in ("sum", "count")
    ]
    return tuple(float(match[1]) for match in found if match)  # type: ignore[return-value]


def keep(part: str, record: Part) -> None:
    """Each part is a case of benchmarks/suite.py, with its medians."""
    import torch

    from benchmarks.suite import add_run
    from fastldm.system import machine

    header = {"command": f"python -m benchmarks.serving --part {part}", "machine": machine(torch.device("cpu"))}
    if "ms" in record:
        seconds = {name: ms / 1000 for name, ms in record["ms"].items()}
    else:
        names = ("kind", "server", "answer")
        seconds = {
            ", ".join([*(row[name] for name in names if name in row), f"{row['clients']} clients"]): row["p50 ms"]
            / 1000
            for row in record["table"]
        }
    add_run(f"serving-{part}", {**header, "seconds": seconds, **record})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="few requests, to see that it runs")
    parser.add_argument("--keep", action="store_true", help="add the run to benchmarks/results")
    args = parser.parse_args()
    for part in args.part or PARTS:
        record: Part = globals()[part](args.rounds, args.quick)
        record |= {"rounds": args.rounds, "load average": [round(value, 1) for value in os.getloadavg()]}
        print(json.dumps({part: record}, indent=1), flush=True)
        if args.keep:
            keep(part, record)


if __name__ == "__main__":
    main()
