"""What is saved on one layout is read bit for bit on another."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ltrain.checkpoint import Checkpoint, CheckpointError, DamagedError, Entry, LocalCollectives, save
from ltrain.checkpoint.index import DTYPES, coverage_fault
from ltrain.checkpoint.parameters import entries, fill
from ltrain.model.layers import ParamLayout, Shard, constant, new_parameter, pieces, shard_of
from tests.checkpoint.thread_ranks import on_ranks

LOCAL = LocalCollectives()
META = {"tokens": 4096, "layout": {"tensor": 4}, "loader": {"cursors": [1, 2]}, "lr": 0.1}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def whole(entry_name: str, tensor: torch.Tensor, kind: str = "param") -> Entry:
    return Entry(entry_name, kind, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def rows(tensor: torch.Tensor, part: int, parts: int, axis: int = 0) -> tuple[tuple[int, ...], torch.Tensor]:
    """The part-th of uneven shares along an axis, and where it starts."""
    n = tensor.shape[axis]
    low, high = n * part // parts, n * (part + 1) // parts
    return tuple(low if a == axis else 0 for a in range(tensor.ndim)), tensor.narrow(axis, low, high - low)


@pytest.mark.parametrize("axis", [0, 1])
def test_four_ranks_to_any_number(tmp_path, axis):
    full = torch.randn(22, 13)

    def work(c):
        start, local = rows(full, c.rank, 4, axis)
        return save(tmp_path, 7, [Entry("w", "param", (22, 13), start, local)], META, c, {"config.yaml": b"seed: 1\n"})

    paths = on_ranks(4, work)
    assert paths == [tmp_path / "step-00000007"] * 4
    assert sorted(p.name for p in paths[0].iterdir()) == ["config.yaml", "index.json", *(f"rank-0000{r}.safetensors" for r in range(4))]
    with Checkpoint(paths[0], verify=True) as checkpoint:
        assert (checkpoint.step, checkpoint.meta, checkpoint.kinds, checkpoint.names("param")) == (7, META, ["param"], ["w"])
        assert checkpoint.shape("w", "param") == (22, 13)
        for parts, cut in product([1, 2, 3, 5], [0, 1]):
            for part in range(parts):
                start, local = rows(full, part, parts, cut)
                assert torch.equal(checkpoint.read("w", "param", start, local.shape), local)
        assert torch.equal(checkpoint.read("w", "param", (3, 2), (15, 9)), full[3:18, 2:11])  # across every piece, aligned with none
        assert torch.equal(checkpoint.read("w", "param"), full)


def test_files_are_what_the_safetensors_package_reads(tmp_path):
    tensors = [whole("a", torch.randn(3, 5)), whole("b", torch.randn(2).bfloat16()), whole("c", torch.tensor(3), "buffer")]
    path = save(tmp_path, 0, tensors, {}, LOCAL)
    loaded = load_file(path / "rank-00000.safetensors")
    assert {key: bits(t) for key, t in loaded.items()} == {
        "param/a/0,0": bits(tensors[0].tensor),
        "param/b/0": bits(tensors[1].tensor),
        "buffer/c/": bits(tensors[2].tensor),
    }
    assert json.loads((path / "index.json").read_bytes())["version"] == 1


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_dtype_and_shape_is_bit_exact(tmp_path, dtype):
    random = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * 5 * dtype.itemsize,), dtype=torch.uint8)  # NaN payloads among them
    tensors = {"matrix": random.view(dtype).view(6, 5), "columns": random.view(dtype).view(5, 6).t(), "scalar": random.view(dtype)[0]}
    tensors |= {"empty": torch.empty(0, dtype=dtype), "no_columns": torch.empty(4, 0, dtype=dtype)}
    path = save(tmp_path, 1, [whole(name, t) for name, t in tensors.items()], {}, LOCAL)
    with Checkpoint(path, verify=True) as checkpoint:
        for name, tensor in tensors.items():
            read = checkpoint.read(name, "param")
            assert (read.dtype, read.shape, bits(read)) == (dtype, tensor.shape, bits(tensor)), name


def local_parameter(layout: ParamLayout, shard: Shard) -> nn.Parameter:
    return new_parameter(layout, shard, dtype=torch.float64)


LAYOUTS = {
    "fused": ParamLayout((24, 3), constant(0.0), axis=0, splits=(12, 4, 8)),
    "rows": ParamLayout((3, 8), constant(0.0), axis=1),
    "replicated": ParamLayout((5,), constant(0.0)),
    "scalar": ParamLayout((), constant(0.0)),
    "layers.0.experts.up": ParamLayout((4, 3), constant(0.0), experts=8),
}


@pytest.mark.parametrize(("saved", "loaded"), [((4, 1), (1, 1)), ((1, 1), (4, 4)), ((4, 4), (2, 2)), ((2, 4), (4, 1))], ids=str)
def test_parameters_move_between_tensor_and_expert_degrees(tmp_path, saved, loaded):
    def logical(name, shape):  # values that say where they belong
        base = sum(map(ord, name)) * 1000
        return base + torch.arange(max(1, torch.Size(shape).numel()), dtype=torch.float64).reshape(shape)

    def fill_in(param, name):
        for piece in pieces(name, param):
            local = param.data[piece.index]
            local.copy_(logical(piece.name, piece.shape)[tuple(slice(s, s + n) for s, n in zip(piece.start, local.shape, strict=True))])
        return param

    def params(degrees, rank):
        tensor, expert = degrees
        shard = Shard(rank % tensor, tensor, rank % expert, expert)
        return {name: local_parameter(layout, shard) for name, layout in LAYOUTS.items()}

    def write(c):
        held = {name: fill_in(p, name) for name, p in params(saved, c.rank).items()}
        # every rank hands in all that it holds: replicas are written once
        return save(tmp_path, 1, [e for name, p in held.items() for e in entries(name, p, "exp_avg", p)], {}, c)

    paths = on_ranks(max(saved), write)
    assert paths[0] == tmp_path / "step-00000001", paths[0]
    with Checkpoint(paths[0], verify=True) as checkpoint:
        assert "layers.0.experts.7.up" in checkpoint.names("exp_avg")
        for rank in range(max(loaded)):
            for name, param in params(loaded, rank).items():
                expected = fill_in(local_parameter(LAYOUTS[name], shard_of(param)), name)
                param.data.fill_(-1)
                fill(name, param, "exp_avg", param, checkpoint)
                assert torch.equal(param, expected), name


def test_replicas_are_written_once_and_shared_out(tmp_path):
    weights = [torch.randn(64, 64) for _ in range(8)]
    path = on_ranks(4, lambda c: save(tmp_path, 1, [whole(f"w{i}", w) for i, w in enumerate(weights)], {}, c))[0]
    sizes = [f.stat().st_size for f in path.glob("rank-*")]
    assert len(sizes) == 4
    assert all(2 * 64 * 64 * 4 <= size < 2.1 * 64 * 64 * 4 for size in sizes)


def test_ranks_with_nothing_to_write_have_no_file(tmp_path):
    path = on_ranks(3, lambda c: save(tmp_path, 1, [whole("w", torch.ones(2))] if c.rank == 1 else [], {}, c))[2]
    assert [f.name for f in path.glob("rank-*")] == ["rank-00001.safetensors"]
    assert torch.equal(Checkpoint(path).read("w", "param"), torch.ones(2))


def test_coverage():
    assert coverage_fault((4, 6), [((0, 0), (4, 3)), ((0, 3), (1, 3)), ((1, 3), (3, 3))]) is None
    assert (
        coverage_fault((4, 6), [((0, 0), (4, 3)), ((0, 3), (1, 3)), ((1, 3), (2, 3))])
        == "of shape [4, 6] has no piece for the elements from [3, 3] to before [4, 6]"
    )
    assert "2 different pieces for the elements from [1, 0] to before [2, 6]" in coverage_fault((4, 6), [((0, 0), (2, 6)), ((1, 0), (3, 6))])
    assert "outside" in coverage_fault((4,), [((2,), (3,))])
    assert coverage_fault((4,), []) == "has no piece"
    assert coverage_fault((), [((), ())]) is None


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (Entry("w", "param", (8, 2), (6, 0), torch.ones(1, 2)), "no piece for the elements from [7, 0]"),
        (Entry("w", "param", (8, 2), (5, 0), torch.ones(3, 2)), "2 different pieces"),
        (Entry("w", "param", (9, 2), (6, 0), torch.ones(3, 2)), "on another: give its whole shape"),
        (Entry("w", "param", (8, 2), (6, 0), torch.ones(2, 2).half()), "float16"),
        (Entry("w", "param", (8, 2), (6, 0), torch.ones(2)), "outside the whole shape"),
        (Entry("z", "param", (1,), (0,), torch.ones(1, dtype=torch.complex64)), "convert it"),
    ],
)
def test_wrong_pieces_are_refused_on_every_rank(tmp_path, entry, words):
    good = Entry("w", "param", (8, 2), (0, 0), torch.ones(6, 2))
    errors = on_ranks(2, lambda c: save(tmp_path, 1, [good] if c.rank == 0 else [entry], {}, c))
    assert all(isinstance(e, CheckpointError) and words in str(e) for e in errors), errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("meta", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": torch.ones(1)}])
def test_meta_that_json_would_change_is_refused(tmp_path, meta):
    with pytest.raises(CheckpointError, match="meta"):
        save(tmp_path, 1, [], meta, LOCAL)


@pytest.mark.parametrize("name", ["../x", "a/b", "index.json", "rank-00000.safetensors", ".hidden"])
def test_file_names_are_checked(tmp_path, name):
    with pytest.raises(CheckpointError, match="plain name"):
        save(tmp_path, 1, [], {}, LOCAL, {name: b""})


def test_reading_what_is_not_there(tmp_path):
    checkpoint = Checkpoint(save(tmp_path, 1, [whole("w", torch.ones(4, 4))], {}, LOCAL))
    for arguments in (("v", "param"), ("w", "exp_avg"), ("w", "param", (2, 0), (3, 4)), ("w", "param", (0,), (4,)), ("w", "param", (-1, 0), (1, 1))):
        with pytest.raises(CheckpointError, match="give the model that was saved"):
            checkpoint.read(*arguments)
    with pytest.raises(CheckpointError, match=r"shape \[4, 4\].*\[5, 4\] in this model"):
        param = local_parameter(ParamLayout((5, 4), constant(0.0)), Shard())
        fill("w", param, "param", param, checkpoint)
    with pytest.raises(DamagedError, match=r"no index\.json"):
        Checkpoint(tmp_path)


def test_only_the_bytes_of_the_rectangle_are_read(tmp_path):
    path = save(tmp_path, 1, [whole("w", torch.zeros(1).expand(1 << 14, 1024))], {}, LOCAL)  # 64 MB

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    with Checkpoint(path) as checkpoint:
        checkpoint.read("w", "param", (0, 0), (1, 1))
        before = resident()
        assert checkpoint.read("w", "param", (16000, 0), (8, 1024)).shape == (8, 1024)
        assert resident() - before < 16 << 20
