"""A small OpenAI-compatible completions server for the tests: a process of its own, on loopback.

    python completions_server.py [--model FOLDER]

prints the port it listens on. With a model it samples from it; without one (quick to start) every completion is the
tokens 5, 6, EOS. POST /test {"mode": ..., "times": n} makes it misbehave on the next n completion requests; GET /test
tells what it has seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "a-secret"
STATE = {
    "mode": None,
    "times": 0,
    "seconds": 0.3,
    "requests": 0,
    "most_at_once": 0,
    "at_once": 0,
    "last": None,
    "authorized": None,
}
LOCK = threading.Lock()


class Canned:
    """Every completion the same."""

    def complete(self, body: dict) -> list[tuple[list[int], list[float], list[list[float]]]]:
        eos = body["stop_token_ids"][0]
        return [([5, 6, eos], [-1.0, -0.5, -0.25], [[-0.5, -1.5]]) for _ in range(body["n"])]


class Model:
    """A causal LM, sampled token by token."""

    def __init__(self, folder: str):
        self.load(folder)

    def load(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def complete(self, body: dict) -> list[tuple[list[int], list[float], list[list[float]]]]:
        import torch

        generator = torch.Generator().manual_seed(body["seed"])
        greedy = body["temperature"] == 0
        temperature = 1.0 if greedy else body["temperature"]
        found = []
        with torch.no_grad():
            for _ in range(body["n"]):
                ids, logprob, top = list(body["prompt"]), [], []
                for _ in range(body["max_tokens"]):
                    logits = self.model(torch.tensor([ids])).logits[0, -1].float()
                    logprobs = torch.log_softmax(logits / temperature, -1)
                    drawn = logprobs.exp().multinomial(1, generator=generator)
                    token = int(logprobs.argmax() if greedy else drawn)
                    told = torch.log_softmax(logits, -1) if STATE["mode"] == "raw" else logprobs
                    ids.append(token)
                    logprob.append(float(told[token]))
                    top.append(told.topk(2).values.tolist())
                    if token in body["stop_token_ids"]:
                        break
                found.append((ids[len(body["prompt"]) :], logprob, top))
        return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value, status: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/v1/models":
            self.answer({"object": "list", "data": [{"id": "tiny"}]})
        else:
            self.answer(STATE)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/test":
            STATE.update(body)
            self.answer({})
        elif self.path == "/update_weights_from_disk":
            self.server.model.load(body["model_path"])
            self.answer({"success": STATE["mode"] != "refuse", "message": "as told"})
        else:
            self.completions(body)

    def completions(self, body: dict) -> None:
        with LOCK:
            STATE["requests"] += 1
            STATE["at_once"] += 1
            STATE["most_at_once"] = max(STATE["most_at_once"], STATE["at_once"])
            STATE["last"], STATE["authorized"] = body, self.headers["Authorization"] == f"Bearer {KEY}"
            mode = STATE["mode"] if STATE["times"] > 0 else None
            STATE["times"] -= 1
        try:
            self.behave(mode, body)
        finally:
            with LOCK:
                STATE["at_once"] -= 1

    def piecemeal(self, mode: str) -> None:
        """An answer that is announced whole and breaks off, that comes ever so slowly, or that does not end."""
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 40))
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client has left
            for _ in range({"cut": 0, "drip": 1000, "huge": 1000}[mode]):
                self.wfile.write(b" " * (1 << 16 if mode == "huge" else 1))
                time.sleep(0 if mode == "huge" else 0.05)

    def behave(self, mode: str | None, body: dict) -> None:
        if mode == "die":
            os._exit(1)
        if mode == "drop":
            self.close_connection = True
            return self.connection.close()
        if mode == "garbage":
            return self.answer(b"<html>a proxy's page</html>")
        if mode == "deep":
            return self.answer(b"[" * 200_000)
        if mode in ("cut", "drip", "huge"):
            return self.piecemeal(mode)
        if mode in ("400", "503"):
            return self.answer({"error": "as told"}, int(mode))
        if mode == "redirect":
            self.send_response(302)
            self.send_header("Location", "/v1/models")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if mode == "slow":
            time.sleep(STATE["seconds"])
        choices = []
        for index, (ids, logprob, top) in enumerate(self.server.model.complete(body)):
            names = [f"token_id:{t}" for t in ids]
            tops = [{f"token_id:{k}": v for k, v in enumerate(values)} for values in top]
            logprobs = {"tokens": names, "token_logprobs": logprob, "top_logprobs": tops}
            reason = "stop" if ids[-1] in body["stop_token_ids"] else "length"
            choices.append({"index": index, "text": "", "logprobs": logprobs, "finish_reason": reason})
        choices.reverse()  # the order is not promised
        self.answer({"choices": choices, "usage": {"prompt_tokens": len(body["prompt"])}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    server.model = Model(arguments.model) if arguments.model else Canned()
    print(server.server_address[1], flush=True)
    server.serve_forever()
