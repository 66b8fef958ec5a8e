"""Nothing that is received runs: Python itself is asked, by its audit events, while hostile bytes are read.

`tests/test_architecture.py` reads the package's source for what could run; here the same is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Each reader gets a pickle that would write a file, in every place where the other side puts bytes or names.
PROGRAM = r"""
import base64, json, os, pickle, sys
import numpy as np
from helpers.fake_engine import make_info
from torchrl_sglang_hidden import Request, HiddenSpec
from torchrl_sglang_hidden.errors import SGLangHiddenError
from torchrl_sglang_hidden.protocol import CHANNEL, PROTOCOL, Status, unpack_answer, unpack_options
from torchrl_sglang_hidden.protocol.served_weights import ServedWeights
from torchrl_sglang_hidden.service.body import read_body
from torchrl_sglang_hidden.sglang_api.responses import read_rows

class Bomb:
    def __reduce__(self):
        return (os.system, ("touch " + sys.argv[1],))

raw = pickle.dumps(Bomb())
forms = [raw, raw.hex(), base64.b64encode(raw).decode(), base64.b64encode(raw), raw.decode("latin-1"),
         json.dumps({"callable": raw.hex()}), "__import__('os').system('touch " + sys.argv[1] + "')"]
happened, reading = [], False
DANGEROUS = ("pickle.find_class", "exec", "compile", "marshal.loads", "os.system", "subprocess.Popen", "ctypes.dlopen")
def watch(event, args):
    if reading and event in DANGEROUS:
        happened.append((event, args))

def filled(value, form):
    if isinstance(value, dict):
        return {key: filled(one, form) for key, one in value.items()}
    return [filled(one, form) for one in value] if isinstance(value, (list, tuple)) else form

def readers(form):
    request = Request((1, 2), {"max_new_tokens": 2}, hidden=HiddenSpec())
    part = {"protocol": PROTOCOL, "pools": form, "logits": form, "way": form, "refused": None, "states": [form],
            "dtype": form, "shape": form, "data": form, "file": form}
    meta = {"id": form, "finish_reason": {"type": "stop"}, "weight_version": form, "prompt_tokens": 2,
            "output_token_logprobs": form, CHANNEL: [part]}
    yield lambda: read_rows([request], [{"text": form, "output_ids": [1], "meta_info": meta}], make_info())
    yield lambda: unpack_answer([part], "row", 8, shared=True)
    yield lambda: unpack_options({CHANNEL: part})
    yield lambda: unpack_options({CHANNEL: form})
    yield lambda: Status.unpack(dict.fromkeys(Status.__slots__, form) | {"protocol": PROTOCOL})
    yield lambda: ServedWeights.unpack({"parameter": form})
    yield lambda: read_body(form if isinstance(form, bytes) else form.encode(), "float")
    yield lambda: read_body(json.dumps({"input": str(form), "custom_logit_processor": str(form)}).encode(), "float")

def attempt(call):
    global reading
    reading = True
    try:
        call()
    except Exception:
        pass
    finally:
        reading = False

for call in readers("warm"):  # what is imported when first used is not received
    attempt(call)
happened.clear()
sys.addaudithook(watch)
tried = 0
for form in forms:
    for call in readers(form):
        attempt(call)
        tried += 1
# The watch sees what it is there for.
before = list(happened)
reading = True
pickle.loads(pickle.dumps(np.float32))
reading = False
assert len(happened) > len(before), "the watch is blind"
print(tried, before, os.path.exists(sys.argv[1]))
"""


def test_hostile_bytes_run_nothing(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"{tmp_path}/touched"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "56 [] False", done.stdout + done.stderr
