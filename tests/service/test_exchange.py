"""What routing reads of a body, whatever a client sends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xllm_plugin.service.exchange import peek

MULTIPART = b"multipart/form-data; boundary=x"
FORM = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nwav\r\n'


@pytest.mark.parametrize(
    ("part", "model"),
    [
        (b'Content-Disposition: form-data; name="model"\r\n\r\nb\r\n', "b"),
        (b"content-disposition:form-data;name=model\r\nContent-Type: text/plain\r\n\r\nb\r\n", "b"),
        (b'Content-Disposition: form-data; name="model"; x=1\r\n\r\n\xff\r\n', "\ufffd"),
        (b'Content-Disposition: form-data; name="model_x"\r\n\r\nb\r\n', None),
        (b"Content-Disposition: form-data; name=models\r\n\r\nb\r\n", None),
        (b'Content-Disposition: form-data; filename="model"\r\n\r\nb\r\n', None),
        (b'X: name="model"\r\n\r\nb\r\n', None),
        (b'Content-Disposition: form-data; name="model"\r\n\r\n' + b"b" * 257 + b"\r\n", None),
    ],
)
@pytest.mark.parametrize("before", [b"", FORM])
def test_the_model_of_a_form(before: bytes, part: bytes, model: str | None) -> None:
    assert peek(before + b"--x\r\n" + part + b"--x--\r\n", MULTIPART).model == model


@pytest.mark.parametrize(
    "piece",
    [
        b"name=model",
        b"name=model\r\n",
        b"\r\nContent-Disposition: x; name=model",
        b"\r\nContent-Disposition: x; name=model\r\ny: " + b"z" * 500,
        b"\r\nContent-Disposition:" + b" name=model" * 40,
        b"\r\n",
    ],
)
def test_no_form_costs_more_than_it_is_long(piece: bytes) -> None:
    """In a process of its own, which the kernel ends when it has used ten seconds."""
    program = f"""
import resource
from xllm_plugin.service.exchange import peek
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
piece = {piece!r}
assert peek(piece * (2**23 // len(piece)), b"multipart/x").model is None
"""
    subprocess.run([sys.executable, "-c", program], check=True)
