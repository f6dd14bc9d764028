"""Attention weights by head: slices, each head's own projection, and where heads lie in every architecture."""

import copy
import json
from fnmatch import fnmatchcase

import pytest
import torch
import transformers

import funcattrib as fa
from funcattrib import testing as laws
from funcattrib.chain.lowering import lower
from funcattrib.errors import ChainError
from funcattrib.lift import Split
from funcattrib.training.capture import collecting
from funcattrib.transforms.random import generator, rademacher
from funcattrib.transforms.registry import rebuild
from tests.support import cases
from tests.support.sweeps import crossed

MODELS = ["gpt_neox", "gpt2", "llama", "qwen3"]


def rows(count, size):
    return {h: lambda g, h=h: g[size * h : size * (h + 1)] for h in range(count)}


def columns(count, size):
    return {h: lambda g, h=h: g[:, size * h : size * (h + 1)] for h in range(count)}


def three_blocks(width, count, size):
    """GPT-2's: query, key and value one after the other along the last axis."""
    return {
        h: lambda g, h=h: torch.cat([g[..., width * k + size * h : width * k + size * (h + 1)] for k in range(3)], -1)
        for h in range(count)
    }


# Four heads of six, and two for keys and values where queries are grouped; all written out by hand.
SLICES = {
    "gpt_neox": {"query_key_value": rows(4, 18), "attention.dense": columns(4, 6)},
    "gpt2": {"c_attn": three_blocks(24, 4, 6), "attn.c_proj": rows(4, 6)},
    "llama": {"q_proj": rows(4, 6), "k_proj": rows(2, 6), "v_proj": rows(2, 6), "o_proj": columns(4, 6)},
}
SLICES["qwen3"] = SLICES["llama"]
ATTENTION = {"gpt_neox": "attention", "gpt2": "attn", "llama": "self_attn"}


def sliced(model, dense):
    """Every leaf of ``dense`` gradients (B, *shape), the attention weights by head."""
    leaves = {}
    for name, grad in dense.items():
        module, _, kind = name.rpartition(".")
        found = next((one for end, one in SLICES[model].items() if module.endswith(f".{end}")), None)
        if found is None or (kind == "bias" and module.endswith(("dense", "c_proj"))):
            leaves[name] = grad
        else:
            leaves |= {f"{name}#h{h}": torch.stack([take(g) for g in grad]) for h, take in found.items()}
    return leaves


def double(name, modules=None):
    model = copy.deepcopy(cases.causal(name)).double()
    return model, *fa.causal_lm_loss(model, modules=modules)


@pytest.mark.parametrize("modules", [None, "all"])
@pytest.mark.parametrize("name", MODELS)
def test_heads_are_slices_of_the_gradient(name, modules) -> None:
    model, loss, params = double(name, modules)
    dense = fa.per_example_grad(loss, params, cases.batch())
    chain = fa.compose(fa.per_example_grad, fa.split_heads(fa.attention_configs(model)))
    expected = sliced(name, dense)
    laws.close(chain(loss, params, cases.batch()), expected, 1e-10)
    laws.close(chain.plain(loss, params, cases.batch()), expected, 1e-10)
    assert len(expected) > len(dense)


@pytest.mark.parametrize("after", [False, True], ids=["split first", "project first"])
@pytest.mark.parametrize("name", MODELS)
def test_each_head_has_its_own_projection(name, after) -> None:
    model, loss, params = double(name)
    stages = [fa.split_heads(fa.attention_configs(model)), fa.project(4, seed=3)]
    chain = fa.compose(fa.per_example_grad, *(stages[::-1] if after else stages))
    assert [stage.name for stage in chain.stages] == ["split_heads", "project"]
    ours = chain(loss, params, cases.batch())
    for leaf, grad in sliced(name, fa.per_example_grad(loss, params, cases.batch())).items():
        parameter, _, head = leaf.partition("#")
        by_columns = ("o_proj", "attention.dense") if name != "gpt2" else ("c_attn",)
        names = {"left": leaf, "right": leaf}
        if head:
            names["left" if any(part in parameter for part in by_columns) else "right"] = parameter
        sides = [
            torch.eye(n).double() if n <= 4 else rademacher(4, n, generator(3, names[side], side)).double()
            for side, n in zip(("left", "right"), grad.shape[1:], strict=True)
        ]
        expected = torch.einsum("po,boi,qi->bpq", sides[0], grad, sides[1])
        torch.testing.assert_close(ours[leaf], expected, rtol=1e-9, atol=1e-12)


def one_head():
    return fa.select(["*#h1"])


CHAINS = {
    "split": [],
    "project": [fa.project(4)],
    "project twice": [fa.project(5), fa.project(3)],
    "adafactor of the heads": [fa.adafactor_norm],
    "adafactor of the heads, project": [fa.adafactor_norm, fa.project(4)],
    "adam of the heads": [fa.adam_norm],
    "adam of the heads, project": [fa.adam_norm, fa.project(4)],
    "some heads": [fa.select(["*#h0", "*#h1"]), fa.project(4)],
    "one head": [one_head, fa.project(4)],
    "project, one head": [fa.project(4), one_head, fa.adafactor_norm],
    "project, unit norm": [fa.project(4), fa.unit_norm],
    "adam of some heads": [fa.adam_norm, fa.select(["*#h0", "*#h1"]), fa.adafactor_norm],
}


BEFORE = {"nothing": None, "adafactor": fa.adafactor_norm, "adam": fa.adam_norm}


@pytest.mark.parametrize(("name", "chain", "first"), crossed(MODELS[:3], CHAINS, BEFORE))
def test_a_lowered_chain_is_the_plain_chain(name, chain, first) -> None:
    behind, before = CHAINS[chain], BEFORE[first]
    model = cases.causal(name)
    # The gradient of a key's bias is rounding alone: nothing to divide.
    kind = "weight" if before or any("norm" in str(stage) for stage in behind) else ""
    loss, params = fa.causal_lm_loss(model, modules=[f"*{ATTENTION[name]}*{kind}"])
    batches = [cases.batch((9, 5)), cases.batch((12, 2), seed=2)]
    split = fa.split_heads(fa.attention_configs(model))
    chain = fa.compose(fa.per_example_grad, *([before] if before else []), split, *behind)
    state = chain.fit(loss, params, batches)
    spec = fa.per_example_grad.spec(params)
    depth = lower(chain.stages, spec, state)[1]
    assert depth == len(chain.stages) - (chain.stages[-1].name == "unit_norm")
    lowered = chain(loss, params, batches[0], state)
    laws.close(lowered, chain.plain(loss, params, batches[0], state), 5e-5)
    announced = {n: (leaf.shape, leaf.dtype) for n, leaf in chain.init(spec)[1].items()}
    assert {n: (tuple(g.shape[1:]), g.dtype) for n, g in lowered.items()} == announced


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_read_in_one_product(name) -> None:
    model = cases.causal(name)
    _, params = fa.causal_lm_loss(model)
    for stages in ([fa.project(4)], [fa.select(["*#h0", "*#h1"]), fa.project(4)], [fa.project(5), fa.project(4)]):
        chain = fa.compose(fa.per_example_grad, fa.split_heads(fa.attention_configs(model)), *stages)
        spec = fa.per_example_grad.spec(params)
        lowered, _ = lower(chain.stages, spec, chain.init(spec)[0])
        assert {type(how.map) for how in lowered.values() if len(how.leaves) > 1} == {Split}


def test_heads_in_batched_autograd() -> None:
    model = copy.deepcopy(cases.causal("llama"))
    config = fa.attention_configs(model)
    chain = fa.compose(fa.split_heads(config), fa.project(4))
    loss, params = fa.causal_lm_loss(model)
    batch = cases.batch((9, 9), masked=False)
    state = chain.init(fa.per_example_grad.spec(params))[0]
    with collecting(model, params, chain, state) as collected:
        logits = model(batch["input_ids"]).logits[:, :-1]
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        ).backward()
    expected = fa.compose(fa.per_example_grad, chain)(loss, params, batch, state)
    laws.close(collected.coordinates(), expected, 1e-4)


def test_a_head_s_draw_is_its_own() -> None:
    """Whichever other heads and parameters are attributed."""
    model = cases.causal("llama")
    split, some = fa.split_heads(fa.attention_configs(model)), fa.select(["*0*q_proj*#h2", "*0*q_proj*#h3"])
    loss, params = fa.causal_lm_loss(model)
    whole = fa.compose(fa.per_example_grad, split, fa.project(4))(loss, params, cases.batch())
    part = fa.compose(fa.per_example_grad, split, some, fa.project(4))(loss, params, cases.batch())
    assert len(part) == 2
    laws.close(part, {name: whole[name] for name in part})
    assert not torch.allclose(*part.values())


def test_a_chain_with_heads_is_described_and_rebuilt() -> None:
    split = fa.split_heads(fa.attention_configs(cases.causal("gpt2")))
    chain = fa.compose(fa.per_example_grad, fa.project(4), fa.adam_norm, split)
    described = json.loads(json.dumps(chain.describe()))
    assert [stage["name"] for stage in described] == ["split_heads", "project", "adam_norm"]
    again = rebuild(fa.per_example_grad, described)
    assert again.describe() == chain.describe()
    name = "transformer.h.0.attn.c_attn.weight"
    spec = {name: fa.Leaf((24, 72), torch.float32)}
    assert again.init(spec)[1] == chain.init(spec)[1]
    assert list(again.init(spec)[1]) == [f"{name}#h{h}" for h in range(4)]


def test_a_store_has_columns_by_head(tmp_path) -> None:
    model = cases.causal("gpt2")
    records = [{"input_ids": list(range(1, 9))}, {"input_ids": list(range(20, 26))}]
    loss, params = fa.causal_lm_loss(model)
    chain = fa.compose(fa.per_example_grad, fa.split_heads(fa.attention_configs(model)), fa.project(4))
    store = fa.collect_gradients(model, records, path=tmp_path / "run", chain=chain, dtype="float32", quiet=True)
    name = "transformer.h.1.attn.c_attn.weight#h3"
    for row, record in enumerate(records):
        ids = torch.tensor([record["input_ids"]])
        expected = chain(loss, params, {"input_ids": ids, "labels": ids})
        torch.testing.assert_close(store.gradients(name)[row], expected[name][0], rtol=1e-4, atol=1e-6)


BLOCK = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
GROUPED = {**BLOCK, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GPT = {"vocab_size": 61, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 32, **TOKENS}
ARCHITECTURES = {
    "GPTNeoX": BLOCK,
    "GPT2": GPT,
    "Llama": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 6},
    "Gemma2": {**GROUPED, "head_dim": 6},
    "Phi": {**BLOCK, "partial_rotary_factor": 2 / 3},
    "Phi3": {**GROUPED, **TOKENS},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "Bloom": {"vocab_size": 61, "hidden_size": 24, "n_layer": 1, "n_head": 4},
    "GPTNeo": {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_layers": 1,
        "num_heads": 4,
        "attention_types": [[["local"], 1]],
    },
    "OPT": {**BLOCK, "ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 32},
    "Bert": BLOCK,
    "Mpt": {"vocab_size": 61, "d_model": 24, "n_layers": 1, "n_heads": 4},
}


@pytest.mark.parametrize("stem", ARCHITECTURES)
def test_only_the_rows_of_a_head_feed_it(stem) -> None:
    """Where the output projection reads one head alone, the weights of all others have no gradient."""
    config = getattr(transformers, f"{stem}Config")(**ARCHITECTURES[stem])
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}Model")(config).eval()
    configs = fa.attention_configs(model)
    split = fa.split_heads(configs)
    params = {n: p for n, p in model.named_parameters() if any(fnmatchcase(n, glob) for glob in configs)}
    by_columns = 0 if stem == "GPT2" else 1
    glob = next(g for g, one in configs.items() if one.head_dim == by_columns and g.endswith("weight"))
    assert configs[glob] == fa.AttentionConfig(4, 6, by_columns)
    output = next(name for name in params if fnmatchcase(name, glob))
    keep = model.get_parameter(output)
    saved = keep.detach().clone()
    for head in range(4):
        with torch.no_grad():
            keep.zero_()
            at = slice(6 * head, 6 * (head + 1))
            (keep if stem == "GPT2" else keep.T)[at] = (saved if stem == "GPT2" else saved.T)[at]
        model.zero_grad()
        hidden = model(torch.arange(2, 12)[None]).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)).sum().backward()
        grads = {name: p.grad[None] for name, p in params.items() if name != output}
        fed = {}
        for leaf, grad in split(None, grads).items():
            fed.setdefault(leaf.partition("#")[0], []).append(bool(grad.abs().max() > 1e-9))
        for name, found in fed.items():
            if stem == "Phi3":
                assert found == [h in (head, 4 + head // 2, 6 + head // 2) for h in range(8)], name
            elif not name.endswith(("k_proj.bias", ".key.bias")):  # a constant added to every key changes no attention
                assert found == [h == head * len(found) // 4 for h in range(len(found))], name


def test_attention_configs_names_what_it_knows() -> None:
    configs = fa.attention_configs(cases.causal("llama"))
    prefix = "model.layers.*.self_attn"
    assert configs == {
        f"{prefix}.q_proj.weight": fa.AttentionConfig(4, 6),
        f"{prefix}.k_proj.weight": fa.AttentionConfig(2, 6),
        f"{prefix}.v_proj.weight": fa.AttentionConfig(2, 6),
        f"{prefix}.o_proj.weight": fa.AttentionConfig(4, 6, head_dim=1),
    }
    with pytest.raises(fa.FuncattribError, match="MambaForCausalLM has no attention modules"):
        fa.attention_configs(cases.causal("mamba"))


def test_a_glob_may_leave_out_the_leading_part() -> None:
    spec = {"transformer.h.0.attn.out_proj.weight": fa.Leaf((8, 8), torch.float32)}
    for glob in ("h.0.attn.out_proj", "*.out_proj", "out_proj.weight", "transformer.h.*.attn.out_proj"):
        split = fa.split_heads({glob: fa.AttentionConfig(num_heads=4, head_size=2, head_dim=2)})
        assert {leaf.shape for leaf in split.init(spec)[1].values()} == {(2, 8)}


def test_one_head_is_the_whole_weight() -> None:
    spec = {"q.weight": fa.Leaf((6, 5), torch.float32)}
    split = fa.split_heads({"q": fa.AttentionConfig(1, 2, order="qkv head")})
    assert split.maps(None, spec)["q.weight"].map.is_identity
    grads = {"q.weight": torch.randn(3, 6, 5)}
    laws.same(split(None, grads), {"q.weight#h0": grads["q.weight"]})


MATRIX = {"a.q_proj.weight": fa.Leaf((24, 8), torch.float32)}
REFUSED = {
    "no match": (lambda: fa.split_heads({"k_proj": fa.AttentionConfig(4, 6)}), "splits none of the 1 leaves"),
    "size": (
        lambda: fa.split_heads({"q_proj": fa.AttentionConfig(4, 5)}),
        r"expected 4 × 5 = 20 rows in a.q_proj.weight",
    ),
    "fused": (lambda: fa.split_heads({"q_proj": fa.AttentionConfig(4, 2)}), "is for fused weights"),
    "columns": (lambda: fa.split_heads({"q_proj": fa.AttentionConfig(4, 6, 1)}), "24 columns .* found shape"),
    "axis": (lambda: fa.split_heads({"q_proj": fa.AttentionConfig(4, 6, 3)}), "head_dim 0"),
    "order": (lambda: fa.split_heads({"q_proj": fa.AttentionConfig(4, 6, order="v")}), "an order of 'head'"),
    "heads": (
        lambda: fa.split_heads({"q_proj": fa.AttentionConfig(0, 6)}),
        "num_heads and head_size of at least 1, found 0 and 6",
    ),
    "twice": (
        lambda: fa.compose(*[fa.split_heads({"q_proj*": fa.AttentionConfig(4, 6)})] * 2),
        r"stage 2 \(split_heads\) requires whole matrices .* is one part",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ChainError, match=message):
        fa.compose(make()).init(MATRIX)


def test_moments_of_whole_weights_come_before_the_split() -> None:
    moments = {"a.q_proj.weight": torch.ones(24, 8)}
    split = fa.split_heads({"q_proj": fa.AttentionConfig(4, 6)})
    fa.compose(fa.adam_norm(moments), split).init(MATRIX)
    with pytest.raises(ChainError, match="put it before split_heads"):
        fa.compose(split, fa.adam_norm(moments)).init(MATRIX)
