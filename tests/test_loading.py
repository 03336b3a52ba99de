"""Models, adapters, tokenizers and anchors from folders and from a Hub; and what must not be loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from hf_safefilter import AnchorSet, SafetyRiskScorer
from hf_safefilter.engine.loading import load, named_spec, resolve_dtype
from hf_safefilter.errors import InputError
from hf_safefilter.testing import tiny_model, tiny_tokenizer

ROW = {"prompt": "Name a colour.", "completion": "Blue, or green."}


def score(model, anchors, **options) -> float:
    return float(SafetyRiskScorer(model, anchors, **{"dtype": "float32", **options})(ROW)["risk_gradient"])


@pytest.fixture
def adapter(tmp_path, model_folder):
    """A LoRA adapter that changes the model, and its folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_folder_and_loaded_model_agree(model_folder, model, tokenizer, anchors):
    assert score(model_folder, anchors) == pytest.approx(score(model, anchors, tokenizer=tokenizer), abs=1e-6)


def test_a_tokenizer_by_name(model_folder, tmp_path, anchors):
    tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}").save_pretrained(tmp_path / "other")
    assert score(model_folder, anchors, tokenizer=tmp_path / "other") != pytest.approx(score(model_folder, anchors), abs=1e-4)


def test_adapters_are_merged_and_part_of_the_key(model_folder, adapter, tokenizer, anchors):
    folder, wrapped = adapter
    merged = score(model_folder, anchors, adapter=folder)
    assert merged != pytest.approx(score(model_folder, anchors), abs=1e-3)
    assert merged == pytest.approx(score(wrapped.merge_and_unload(), anchors, tokenizer=tokenizer), abs=1e-5)
    with_adapter = SafetyRiskScorer(model_folder, anchors, adapter=folder).fingerprint
    assert with_adapter != SafetyRiskScorer(model_folder, anchors).fingerprint
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * 2 for k, v in weights.items()}, folder / "adapter_model.safetensors")
    assert SafetyRiskScorer(model_folder, anchors, adapter=folder).fingerprint != with_adapter


def test_a_model_wrapped_by_peft(adapter, tokenizer, anchors):
    """Unmerged: the adapter's factors are parameters like the others."""
    _, wrapped = adapter
    scorer = SafetyRiskScorer(wrapped, anchors, tokenizer=tokenizer)
    result = scorer(ROW)
    assert result["risk_status"] == "ok"
    assert abs(result["risk_gradient"]) < 3


def test_what_does_not_fit(model_folder, adapter, tmp_path, anchors):
    folder, _ = adapter
    other = tmp_path / "wide"
    tiny_model(hidden_size=48).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(InputError, match="adapter .* does not fit the model"):
        score(other, anchors, adapter=folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model.safetensors \(pickled weights are not loaded\)"):
        score(model_folder, anchors, adapter=folder)


def test_pickled_weights_are_not_loaded(model_folder, anchors):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (model_folder / "model.safetensors").unlink()
    torch.save({"bomb": Bomb()}, model_folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load the model"):
        score(model_folder, anchors)


def test_remote_code_is_not_run(model_folder, anchors):
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {k: f"evil.{k}" for k in ("AutoConfig", "AutoModelForCausalLM")}}
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "evil.py").write_text("raise SystemExit('ran')")
    (model_folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="cannot load"):
        score(model_folder, anchors)


def test_a_checkpoint_without_its_head(model_folder, anchors):
    weights = load_file(model_folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"incomplete: 1 weights are missing, 'lm_head.weight' among them"):
        score(model_folder, anchors)


def test_models_without_a_head(model, tokenizer, anchors, tmp_path):
    with pytest.raises(InputError, match=r"LlamaModel has no language-model head; pass a causal language model"):
        SafetyRiskScorer(model.model, anchors, tokenizer=tokenizer)
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    CLIPTextModel(config).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    with pytest.raises(InputError, match="cannot load the model"):
        score(tmp_path / "clip", anchors)


def test_damaged_folders(model_folder, tmp_path, anchors):
    with pytest.raises(InputError, match="model must be a Hub id, a folder, a .gguf file or a loaded model, got int"):
        SafetyRiskScorer(3, anchors)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no config.json"):
        SafetyRiskScorer(tmp_path / "empty", anchors)
    with pytest.raises(InputError, match="revision='v1' is for Hub ids"):
        SafetyRiskScorer(model_folder, anchors, revision="v1")
    with pytest.raises(InputError, match="has no w.gguf"):
        SafetyRiskScorer(model_folder, anchors, gguf_file="w.gguf")
    with pytest.raises(InputError, match="no model 'org/none': not a folder here, and not on the Hub"):
        SafetyRiskScorer("org/none", anchors)
    with pytest.raises(InputError, match="no model 'no such thing!'"):
        SafetyRiskScorer("no such thing!", anchors)
    (model_folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot load the model"):
        score(model_folder, anchors)
    (model_folder / "broken.gguf").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        SafetyRiskScorer(model_folder / "broken.gguf", anchors)(ROW)


def test_dtypes():
    assert resolve_dtype("float16", None) == "float16"
    assert resolve_dtype(torch.float64, None) == "float64"
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16")
    assert resolve_dtype("auto", "cpu") == ("bfloat16" if fast else "float32")
    assert resolve_dtype("auto", "cuda") == "bfloat16"
    assert resolve_dtype("auto", "mps") == "float32"
    with pytest.raises(InputError, match="dtype must be 'auto', 'float32'"):
        resolve_dtype("int4", None)


@pytest.mark.parametrize("fast", [True, False])
def test_16_bits_on_a_processor_that_is_slow_at_them(model_folder, anchors, fast, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    load(named_spec(str(model_folder), dtype="bfloat16"), "cpu")
    assert ("multiplies bfloat16 many times slower than float32" in caplog.text) is not fast
    caplog.clear()
    load(named_spec(str(model_folder), dtype="auto"), "cpu")
    assert not caplog.records


def test_bfloat16_is_close(model_folder, anchors):
    assert score(model_folder, anchors, dtype="bfloat16") == pytest.approx(score(model_folder, anchors), abs=0.05)


HUB_SCRIPT = """
import json, sys
from hf_safefilter import AnchorSet, SafetyRiskScorer
anchors = AnchorSet.load("org/anchors")
out = {}
for name, options in json.loads(sys.argv[1]).items():
    try:
        scorer = SafetyRiskScorer("org/model", "org/anchors", dtype="float32", **options)
        spec = scorer.spec
        out[name] = [spec.model.fingerprint, float(scorer(json.loads(sys.argv[2]))["risk_gradient"])]
    except Exception as error:
        out[name] = [type(error).__name__, str(error)]
print(json.dumps(out))
"""


def test_the_hub(tmp_path, model_folder, adapter, anchors):
    """The real client against a Hub on the loopback: ids resolve to commits, offline the cache serves them."""
    hub_root = tmp_path / "hub"
    (hub_root / "models/org").mkdir(parents=True)
    model_folder.rename(hub_root / "models/org/model")
    adapter[0].rename(hub_root / "models/org/adapter")
    anchors.save(hub_root / "datasets/org/anchors")
    cases = {"plain": {}, "adapter": {"adapter": "org/adapter"}, "unknown": {"revision": "v9"}, "none": {"adapter": "org/nope"}}

    def run(endpoint: str, **env: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT, json.dumps(cases), json.dumps(ROW)],
            capture_output=True,
            text=True,
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | env,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with HubServer(hub_root) as hub:
        online = run(hub.endpoint, HF_HUB_OFFLINE="0")
        commit = hub.commit(hub_root / "models/org/model")
        assert online["plain"][0] == commit
        assert online["plain"][1] == pytest.approx(score(hub_root / "models/org/model", anchors), abs=1e-6)
        with_adapter = score(hub_root / "models/org/model", anchors, adapter=hub_root / "models/org/adapter")
        assert online["adapter"][1] == pytest.approx(with_adapter, abs=1e-6)
        assert online["unknown"][0] == online["none"][0] == "InputError"
        assert "no model 'org/model' at revision 'v9'" in online["unknown"][1]
        assert "no adapter 'org/nope'" in online["none"][1]
    offline = run("http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline["plain"] == online["plain"]
    assert offline["adapter"] == online["adapter"]


def test_anchor_sets_save_what_load_reads(anchors, tmp_path):
    assert AnchorSet.load(anchors.save(tmp_path)) == anchors
