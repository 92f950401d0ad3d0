"""One of two processes of ``test_processes``: what it finds beside one process's result, as JSON."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, DistributedConfig

from headscope.interp import HeadscopeError, context_parallel, sweep, tiny_model, trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.split_heads import SplitHeads
from headscope.interp.attention.split_rows import SplitRows
from headscope.interp.benchmarks import shared_card as card
from headscope.interp.models import output_projections
from headscope.interp.models.placement import require_own_weights
from headscope.interp.runs.provenance import fingerprint
from headscope.interp.sites import is_attached
from headscope.interp.sites.before import own_passes
from headscope.interp.statistics import (
    BlockMap,
    Distance,
    Entropy,
    HeadOutput,
    KeyMass,
    KeyNorm,
    LogSumExp,
    Resid,
    SinkMass,
    TargetMass,
    TopKeys,
)
from headscope.interp.statistics.queries import Every, Last
from headscope.interventions import AblateHeads, AddToHeads, apply
from headscope.interventions.edits import EDITS
from headscope.kernels.masks import Mask
from headscope.kernels.request import Columns, Request

FOLDER = Path(sys.argv[1])
STATISTICS = [
    Entropy(),
    LogSumExp(),
    SinkMass(2),
    Distance(),
    TopKeys(2),
    KeyMass(),
    KeyNorm(),
    HeadOutput((0, -1)),
    BlockMap(8),
    TargetMass({"before": lambda at: at - 1}),
]
IDS = torch.randint(4, 100, (2, 25), generator=torch.Generator().manual_seed(0))
AT = torch.arange(25).expand(2, -1)
REAL = torch.ones_like(IDS)
REAL[0, :3] = 0


def record(model: Any, edits: Any = (), parallel: bool = False, queries: Any = None, **inputs: Any) -> Any:
    with context_parallel(model) if parallel else contextlib.nullcontext():
        with apply(model, *edits), trace(model, STATISTICS, queries=queries) as tracer:
            logits = model(use_cache=False, **inputs).logits
    assert not is_attached(model) and "forward" not in vars(model)
    return tracer.record, logits


def apart(one: Any, other: Any) -> dict[str, float]:
    """The largest differences of two results: of any variable of the record, and of the logits."""
    (record, logits), (again, others) = one, other
    assert dict(record.sizes) == dict(again.sizes), (record.sizes, again.sizes)
    found = max(float(abs(record[name] - again[name]).max()) for name in record.data_vars)
    return {"record": found, "logits": float((logits - others).abs().max())}


def refusal(run: Any) -> str:
    try:
        run()
    except HeadscopeError as error:
        return str(error)
    return "not refused"


def split_model(folder: Path, **options: Any) -> Any:
    """The model in ``folder``, whole and under tensor parallelism."""
    whole = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    config = DistributedConfig(tp_size=2)
    return whole, AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **options).eval()


def tensor_parallel() -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole, split = split_model(FOLDER / "llama")
    padded = {"input_ids": IDS, "attention_mask": REAL}
    for name, edits in {"plain": (), "one": (AblateHeads("L0H3"),), "both": (AblateHeads("L0H3,L1H6"),)}.items():
        theirs = record(whole, edits, input_ids=IDS)
        found[name] = apart(theirs, record(split, edits, input_ids=IDS))
        found[f"{name} effect"] = float((theirs[1] - whole(IDS).logits).abs().max())
        found[f"{name} heads"] = theirs[0].sizes["head"]
    few = [Entropy(), SinkMass(2), KeyMass()]

    def written(model: Any) -> Any:
        with apply(model, AblateHeads("L0H3")), trace(model, few) as tracer:
            ids = model.generate(**padded, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        return tracer.record, ids.float()

    found["generated"] = apart(written(whole), written(split))
    prompts = [list(range(4, 4 + n)) for n in (9, 5, 30, 12)]
    swept = sweep(split, prompts, few, out=FOLDER / "swept", progress=False).load()
    with trace(whole, few) as tracer:
        whole(input_ids=torch.tensor([prompts[2]]))
    found["swept"] = float(abs(swept["entropy"][2] - tracer.record["entropy"][0]).max())
    found["swept parts"] = len(list((FOLDER / "swept").glob("part-*")))
    found["fingerprints"] = fingerprint(whole) == fingerprint(split)
    found["gradients"] = refusal(lambda: trace(split, few, grad=True).__enter__())
    found["texts"] = refusal(lambda: record(split, (), input_ids=IDS + dist.get_rank()))
    found["weights"] = refusal(lambda: output_projections(split))
    found["head 8"] = refusal(lambda: apply(split, AblateHeads("L0H8")).__enter__())
    found["neurons"] = refusal(
        lambda: apply(split, EDITS["edit_value_vectors"](neurons=((0, 3),), factor=0.0)).__enter__()
    )
    split.quantization_method = "bitsandbytes"  # what transformers says of one
    found["bitsandbytes"] = refusal(lambda: trace(split, few).__enter__())
    found["one key head"] = refusal(lambda: trace(split_model(FOLDER / "one-key-head")[1], few).__enter__())
    found["shared key head"] = shared_key_head()
    return found


def quantised() -> dict[str, Any]:
    """Int8 weights of what is split by rows, each of which has a scale: the same numbers whole and in parts."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    found: dict[str, Any] = {}
    by_columns = [".*o_proj", ".*down_proj", "lm_head"]
    whole, split = split_model(
        FOLDER / "llama", quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=by_columns)
    )
    found["form"] = type(split.model.layers[0].self_attn.q_proj.weight).__name__
    for name, edits in {"plain": (), "edited": (AblateHeads("L0H3,L1H6"),)}.items():
        found[name] = apart(record(whole, edits, input_ids=IDS), record(split, edits, input_ids=IDS))
    prompts = [IDS[0].tolist(), IDS[1, :9].tolist()]
    swept = sweep(split, prompts, [Entropy()], out=FOLDER / "quantised", progress=False).load()
    with trace(whole, [Entropy()]) as tracer:
        whole(input_ids=IDS[:1])
    found["swept"] = float(abs(swept["entropy"][0] - tracer.record["entropy"][0]).max())
    found["leaf"] = refusal(lambda: require_own_weights(split.model.layers[0].self_attn.q_proj))
    return found


def shared_key_head() -> float:
    """Reductions of a call whose one key/value head every process holds."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 4, generator=draw) for heads in (8, 1, 1))
    call = AttentionCall(q, k, v, Mask.causal(), 0.5, layer=0, module="")
    mine = call.with_(query=q.chunk(2, 1)[dist.get_rank()])
    split = SplitHeads(dist.group.WORLD, dist.get_rank(), (4, 4)).call(mine)
    request = Request(entropy=True, columns=(Columns((2, 7), sum=True, count=True),))
    one, two = call.attend(request), split.attend(request)
    pairs = [(one.entropy, two.entropy), (one.output, two.output), (call.pattern(), split.pattern())]
    pairs += [(getattr(one.columns[0], name), getattr(two.columns[0], name)) for name in ("sum", "count")]
    return max(float((a - b).abs().max()) for a, b in pairs)


def context() -> dict[str, Any]:
    found: dict[str, Any] = {}
    one = {"input_ids": IDS[:1]}
    for kind in ("llama", "gemma3_text"):
        model = tiny_model(kind, num_attention_heads=8, num_key_value_heads=4)
        edits = (AblateHeads("L0H3"),)
        for queries in (None, Last(5), Every(7)):
            theirs = record(model, edits, queries=queries, **one)
            found[f"{kind} {queries}"] = apart(theirs, record(model, edits, True, queries, **one))
        found[f"{kind} two texts"] = apart(record(model, input_ids=IDS), record(model, (), True, input_ids=IDS))
        with context_parallel(model):
            few = model(input_ids=IDS, logits_to_keep=14).logits  # three of the four runs hold some of them
        found[f"{kind} last"] = float((few - model(IDS).logits[:, -14:]).abs().max())
    with context_parallel(model):
        found["padding"] = refusal(lambda: model(input_ids=IDS, attention_mask=REAL))
        found["texts"] = refusal(lambda: model(input_ids=IDS + dist.get_rank()))
        found["positions"] = refusal(lambda: model(input_ids=IDS, position_ids=AT + dist.get_rank()))
        found["packed"] = refusal(lambda: model(input_ids=IDS, position_ids=AT % 12, use_cache=False))
        found["mask"] = refusal(lambda: model(input_ids=IDS, attention_mask=torch.ones(2, 1, 25, 25).bool()))
        found["kept"] = refusal(lambda: model(input_ids=IDS, logits_to_keep=torch.tensor([3])))
        found["numbers kept"] = refusal(lambda: model(input_ids=IDS, logits_to_keep=4 + dist.get_rank()))
        found["gradients"] = refusal(lambda: trace(model, [Entropy()], grad=True).__enter__())
        model.config.output_hidden_states = True
        found["hidden"] = refusal(lambda: model(input_ids=IDS))
        model.config.output_hidden_states = False
        found["tuple"] = float((model(IDS, return_dict=False)[0] - few_of(model, IDS)).abs().max())
        with own_passes(model) as own:
            found["own"] = float((own(IDS).logits - few_of(model, IDS)).abs().max())
        found["cache"] = refusal(lambda: model.generate(IDS, max_new_tokens=2, do_sample=False))
        found["stream"] = refusal(lambda: trace(model, [Resid()]).__enter__())
        found["twice"] = refusal(lambda: context_parallel(model).__enter__())
    with trace(model, [Entropy()]):
        found["traced"] = refusal(lambda: context_parallel(model).__enter__())
    found["recurrent"] = refusal(lambda: context_parallel(tiny_model("qwen3_next")).__enter__())
    mixing = tiny_model("llama")
    mixing.model.layers[0].mlp.register_forward_hook(lambda part, args, out: out + 1e-3 * args[0].mean(1, keepdim=True))
    found["mixing"] = refusal(lambda: context_parallel(mixing).__enter__())
    longer = tiny_model("gemma3_text")
    longer.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    found["rotary"] = refusal(lambda: context_parallel(longer).__enter__())
    fresh = tiny_model(kind, num_attention_heads=8, num_key_value_heads=4)
    found["after"] = float((model(IDS).logits - fresh(IDS).logits).abs().max())
    return found


def shared_card() -> dict[str, Any]:
    """The check that two processes of one card run, as it is and with columns that nobody adds up."""
    tiny = ["--shape", "tiny", "--tokens", "65", "--device", "cpu", "--out", str(FOLDER / "card")]
    found = {"right": card.main(tiny), "written": len(list((FOLDER / "card").glob("*.json")))}
    with mock.patch.object(SplitRows, "_over", lambda self, x, how: x):
        return {**found, "beyond": card.main(tiny[:-2])["beyond"]}


def few_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a model of the same weights that reads all of the text itself."""
    kind = model.config.model_type
    return tiny_model(kind, num_attention_heads=8, num_key_value_heads=4)(ids).logits


def every_edit() -> dict[str, Any]:
    """The largest difference that each registered edit makes beside one process, and its effect."""
    tests = Path(__file__).parents[2] / "interventions"
    whole, split = split_model(FOLDER / "edited")
    ids, few = torch.tensor([[5, 9, 17, 23, 4, 8, 30, 11, 12]]), [Entropy(), KeyMass()]
    plain = whole(ids).logits

    def run(model: Any, edit: Any) -> Any:
        with apply(model, edit), trace(model, few) as tracer:
            return tracer, model(input_ids=ids, use_cache=False).logits

    found: dict[str, Any] = {}
    for name, examples in _module(tests / "test_every_edit.py").EXAMPLES.items():
        for number, settings in enumerate(examples):
            edit = EDITS[name](**settings)
            tracer, logits = run(whole, edit)
            each = found[f"{name} {number}"] = {"effect": float((logits - plain).abs().max())}
            for kind in ("heads", "rows"):
                try:
                    with context_parallel(whole) if kind == "rows" else contextlib.nullcontext():
                        again, others = run(whole if kind == "rows" else split, edit)
                    each[kind] = apart((tracer.record, logits), (again.record, others))
                except HeadscopeError as error:
                    each[kind] = str(error)
    return found


def sharded() -> dict[str, Any]:
    """Weights that FSDP2 shards, and experts over processes: heads are whole in every process."""
    found: dict[str, Any] = {}
    whole, split = tiny_model("llama"), tiny_model("llama")
    for part in (*split.model.layers, split):
        fully_shard(part)
    one = {"input_ids": IDS}
    found["fsdp"] = apart(record(whole, (AblateHeads("L0H3"),), **one), record(split, (AblateHeads("L0H3"),), **one))
    slopes = []
    for model in (whole, split):
        vectors = torch.zeros(2, 4, 32, requires_grad=True)
        with apply(model, AddToHeads(heads="L0H1,L1H2", vectors=vectors), grad=True):
            model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        assert vectors.grad is not None
        slopes.append(vectors.grad)
    found["gradients"] = float((slopes[0] - slopes[1]).abs().max())
    found["slope"] = float(slopes[0].abs().max())
    whole = AutoModelForCausalLM.from_pretrained(FOLDER / "experts").eval()
    config = DistributedConfig(tp_size=2, ep_size=2)
    split = AutoModelForCausalLM.from_pretrained(FOLDER / "experts", distributed_config=config).eval()
    found["experts"] = apart(record(whole, (AblateHeads("L0H3"),), **one), record(split, (AblateHeads("L0H3"),), **one))
    return found


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    with torch.no_grad():
        result = {"heads": tensor_parallel(), "rows": context(), "edits": every_edit()}
        result["card"] = shared_card()
        result["quantised"] = quantised() if importlib.util.find_spec("torchao") else None
    result["sharded"] = sharded()
    (FOLDER / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
