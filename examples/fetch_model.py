"""Fetches one small trained model: PP-OCR's text-direction classifier, 35 BatchNorms, Apache-2.0.

It comes out of a wheel on PyPI, pinned by version and by hash, and stays in `.demo/`.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "rapidocr-onnxruntime==1.4.4"
MEMBER = "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
SHA256 = "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"

TARGET = Path(__file__).parent.parent / ".demo" / "text_direction.onnx"


def fetch() -> Path:
    """The path of the model, downloaded on the first call.

    Raises RuntimeError when it cannot be had, or is not the file that was pinned.
    """
    if TARGET.exists() and _sha256(TARGET.read_bytes()) == SHA256:
        return TARGET
    content = _download()
    if _sha256(content) != SHA256:
        raise RuntimeError(f"{WHEEL} holds another {Path(MEMBER).name} than the one that was pinned")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(content)
    return TARGET


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-cache-dir",
            "-d",
            folder,
            WHEEL,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeError(f"{WHEEL} could not be downloaded: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(MEMBER)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    print(fetch())
