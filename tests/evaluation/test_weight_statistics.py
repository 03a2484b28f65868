"""The command that looks into weights: shapes, mean and spread of each kind of tensor, and the picture."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_gpt2repro.evaluation import weights
from modeling_gpt2repro.evaluation.weights import TensorKind, tensor_kinds
from modeling_gpt2repro.evaluation.weights_figure import plot_weights


@pytest.fixture(scope="module")
def folders(make_model, tiny_tokenizer, tmp_path_factory):
    """Folders of a random model of each kind, beside which a run has saved the first one."""
    root = tmp_path_factory.mktemp("models")
    for kind, folder in (("ours", root / "run" / "model"), ("stock", root / "stock")):
        model = make_model(kind, len(tiny_tokenizer))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) + 0.01)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    return root


def printed(capsys, *argv) -> list[str]:
    weights.main([str(word) for word in argv])
    return capsys.readouterr().out.splitlines()


def test_mean_and_spread_of_a_kind_are_those_of_all_its_blocks_together(carried):
    state = {name: tensor.numpy().astype(np.float64) for name, tensor in carried.state_dict().items()}
    kinds = tensor_kinds(carried)
    assert len(kinds) == 16  # wte, wpe, 12 in each block, 2 of ln_f
    for kind in kinds:
        pattern = kind.name.split("*")
        entries = [a for name, a in state.items() if name.startswith(pattern[0]) and name.endswith(pattern[-1])]
        assert len(entries) == len(kind.stds) == (3 if "*" in kind.name else 1)
        assert kind.shape == entries[0].shape
        assert kind.mean == pytest.approx(np.mean(entries), abs=1e-9)
        assert kind.std == pytest.approx(np.std(entries), rel=1e-6)
        assert kind.stds == pytest.approx([np.std(a) for a in entries], rel=1e-6)


def test_stocks_matrices_are_ours_transposed_with_equal_numbers(stock, carried):
    ours, theirs = ({kind.name: kind for kind in tensor_kinds(model)} for model in (carried, stock))
    assert ours.keys() == theirs.keys()
    for name, kind in ours.items():
        assert kind.stds == pytest.approx(theirs[name].stds, rel=1e-6)
    assert ours["transformer.h.*.attn.c_attn.weight"].shape == (192, 64)
    assert theirs["transformer.h.*.attn.c_attn.weight"].shape == (64, 192)


def test_a_run_is_shown_beside_a_stock_checkpoint(folders, capsys):
    lines = printed(capsys, folders / "run", "--compare", folders / "stock")
    assert lines[0].startswith(f"A {folders / 'run' / 'model'}: ")
    assert lines[1].startswith(f"B {folders / 'stock'}: ")
    [first] = [number for number, line in enumerate(lines) if line.startswith("transformer.h.*.mlp.c_fc.weight")]
    assert lines[first].split()[1:5] == ["A", "2", "x", "(128,"]
    assert lines[first + 1].split()[:4] == ["B", "2", "x", "(32,"]
    assert sum("the same tensor as transformer.wte.weight" in line for line in lines) == 2


def test_a_picture_is_written(folders, tmp_path, capsys):
    assert printed(capsys, folders / "stock", "--output", tmp_path / "a.svg")[-1] == str(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_the_picture_shows_the_columns_and_the_angles_of_the_position_embedding(carried):
    wpe = carried.transformer.wpe.weight.detach().numpy()
    panels = {axes.get_title(loc="left"): axes for axes in plot_weights({"ours": carried}).axes}
    curves = panels["Three of its columns: a channel over the positions"].lines
    assert [line.get_label() for line in curves] == ["channel 12", "channel 16", "channel 20"]  # 64 / 768 of 150, ...
    for line, channel in zip(curves, (12, 16, 20), strict=True):
        assert np.array_equal(line.get_ydata(), wpe[:, channel])
    angles = np.asarray(panels["Cosine similarity of each two positions"].images[0].get_array())
    assert angles[3, 9] == pytest.approx(wpe[3] @ wpe[9] / np.sqrt((wpe[3] ** 2).sum() * (wpe[9] ** 2).sum()), abs=1e-5)
    assert np.diag(angles) == pytest.approx(1, abs=1e-5)
    spread = panels["Standard deviation of the matrices of each block"].lines
    assert [line.get_label() for line in spread] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def test_a_model_without_position_embeddings_has_the_other_numbers(carried):
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape, tie_word_embeddings=False))
    lines = weights.table({"llama": llama})
    assert any(line.startswith("model.layers.*.self_attn.q_proj.weight") for line in lines)
    assert not any("the same tensor" in line for line in lines)
    assert len(plot_weights({"llama": llama}).axes) == 1
    assert "no position embedding" in [
        text.get_text() for axes in plot_weights({"a": carried, "b": llama}).axes for text in axes.texts
    ]


def test_a_kind_by_hand():
    kind = TensorKind("h.*.w", (2,), means=(1.0, 3.0), stds=(0.0, 1.0))  # 1, 1 and 2, 4
    assert (kind.mean, kind.std) == (2.0, pytest.approx(np.std([1, 1, 2, 4])))
    assert weights.numbers(kind).split() == ["2", "x", "(2)", "2.0000", "1.2247", "0.0000", "1.0000"]


def test_what_cannot_be_shown_is_one_sentence_and_exit_code_2(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    good = folders / "stock"
    for words, sentence in (
        ([], "MODEL is missing"),
        (["./none"], "MODEL ./none: there is no such folder"),
        ([tmp_path / "empty"], "empty has no config.json"),
        ([tmp_path / "other"], "could not be loaded"),
        ([good, "--compare", "./none"], "--compare ./none: there is no such folder"),
        ([good, "--output", tmp_path / "none" / "a.png"], "there is no folder"),
        ([good, "--output", tmp_path], "is a folder: give the name of a file in it"),
        ([good, "--output", "a.jpg"], "--output a.jpg must be a .png or .svg file."),
    ):
        with pytest.raises(SystemExit) as end:
            weights.main([str(word) for word in words])
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert message.count("\n") == 1
        assert message.endswith(".\n")
