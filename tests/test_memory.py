"""Masks, packed deltas and the side memory's file: round trips, equal bytes, and refusals a user can act on."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wisecli.errors import InputError, OutputError, UsageError, WiseError
from wisecli.memory import files
from wisecli.memory.bits import BLOCK, SparseDelta, draw, draw_mask, pack_bits, unpack_bits
from wisecli.memory.files import (
    METADATA_KEY,
    append_line,
    ensure_writable,
    load_tensors,
    read_json,
    save_tensors,
    write_bytes,
    write_json,
)
from wisecli.memory.indicator import activation_indicator
from wisecli.memory.keys import KeySpace, KeyStore, crowding, to_int8
from wisecli.memory.lookup import alike
from wisecli.memory.side_memory import EditEntry, Memory, SideMemory
from wisecli.models.prompts import ContentRule
from wisecli.models.site import EditSite

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
seeds = st.integers(0, 2**63 - 1)
PINNED_MASK = [42, 65, 46, 245]
quick = settings(deadline=None, max_examples=60)


def example(seed: int = 0, memories: int = 2) -> SideMemory:
    """A side memory with something in every field."""
    g = torch.Generator().manual_seed(seed)
    site = EditSite("model.layers.2.mlp.down_proj", 2, 12, 7, False)
    deltas = [torch.where(draw_mask((7, 12), 0.3, s), torch.randn(7, 12, generator=g), 0.0) for s in range(memories)]
    space = KeySpace.fit(torch.randn(20, 12, generator=g), torch.arange(20) // 2, 5)
    vectors = space(torch.randn(3, 12, generator=g))
    return SideMemory(
        base={"name": "tïny", "revision": "abc", "model_type": "llama", "fingerprint": {"float32": "00"}},
        site=site,
        rule=ContentRule((0, 1, 2), ((5, 6),), ((7,),)),
        memories=tuple(
            Memory(SparseDelta.pack(d), {"key": 0.5 + j, "activation": 1.25}, (f"e{j}",), {"seed": j}, {"wide": 0.25})
            for j, d in enumerate(deltas)
        ),
        keys=KeyStore.of(space, vectors, torch.tensor([0, 1, 1]), torch.tensor([0.25, 0.5])),
        edits=(EditEntry("e0", 0, True, "Où?", "là", {"loss": 0.1}), EditEntry("e1", 1, False)),
        router="activation",
        chat=True,
        config={"epochs": 3, "nested": {"a": [1, 2.5, None]}},
        statistics={"rel": 1.0},
        versions={"torch": "x"},
    )


def saved(path: Path, sm: SideMemory | None = None) -> Path:
    (sm or example()).save(path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> None:
    """Change manifest or tensors of a file in place; a returned value replaces the manifest."""
    tensors, manifest = load_tensors(path)
    replaced = change(manifest, tensors)
    save_tensors(path, tensors, manifest if replaced is None else replaced)


def assert_same(a: SideMemory, b: SideMemory) -> None:
    assert a.manifest() == b.manifest()
    assert (a.site, a.rule, a.edits, a.extra) == (b.site, b.rule, b.edits, b.extra)
    for x, y in zip(a.memories, b.memories, strict=True):
        assert x.delta.shape == y.delta.shape
        assert x.edits == y.edits
        assert torch.equal(x.delta.bits, y.delta.bits)
        assert torch.equal(x.delta.values, y.delta.values)
        assert x.delta.values.dtype == y.delta.values.dtype
    for x, y in (
        (a.keys.keys, b.keys.keys),
        (a.keys.step, b.keys.step),
        (a.keys.owner, b.keys.owner),
        (a.keys.crowding, b.keys.crowding),
        (a.keys.space.mean, b.keys.space.mean),
        (a.keys.space.projection, b.keys.space.projection),
        (a.keys.space.scale, b.keys.space.scale),
    ):
        assert torch.equal(x, y)
        assert x.dtype == y.dtype


def assert_actionable(error: pytest.ExceptionInfo[WiseError], path: Path) -> None:
    """The message names the file, is one line without a Python type in it, and comes with a next step."""
    assert str(path) in error.value.message
    assert error.value.hint
    for word in ("Traceback", "Error(", "safetensors_rust", "object has no attribute"):
        assert word not in error.value.message


# -- masks and packed deltas -------------------------------------------------------------------------------------------


@quick
@given(shapes, seeds, st.floats(0.01, 1))
def test_mask_depends_on_its_seed_alone(shape: tuple[int, int], seed: int, density: float) -> None:
    torch.manual_seed(seed % 97)
    before = torch.get_rng_state()
    first = draw_mask(shape, density, seed)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw_mask(shape, density, seed), first)
    assert first.dtype == torch.bool
    assert first.shape == shape


def test_mask_is_the_same_on_every_machine() -> None:
    """A pinned draw: a change of torch's generator would silently change every seeded run."""
    assert pack_bits(draw_mask((4, 8), 0.5, 42)).tolist() == PINNED_MASK


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
def test_draws_do_not_depend_on_the_blocks_they_are_made_in(n: int) -> None:
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    assert torch.equal(draw(n, 0.2, ours), torch.rand(n, generator=theirs) < 0.2)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_masks_of_different_seeds_differ_and_have_the_asked_density() -> None:
    masks = [draw_mask((300, 300), 0.2, s) for s in (0, 1)]
    for m in masks:
        assert abs(m.float().mean().item() - 0.2) < 0.01
    overlap = (masks[0] & masks[1]).float().mean().item()
    assert abs(overlap - 0.04) < 0.005


def test_density_one_masks_nothing() -> None:
    assert draw_mask((30, 30), 1.0, 3).all()


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_mask_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(UsageError, match="density"):
        draw_mask((2, 2), density, 0)


@quick
@given(shapes, seeds)
def test_bits_round_trip(shape: tuple[int, int], seed: int) -> None:
    mask = draw_mask(shape, 0.4, seed)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-shape[0] * shape[1] // 8)
    assert torch.equal(unpack_bits(bits, shape), mask)


def test_bits_are_packed_most_significant_first() -> None:
    assert pack_bits(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1, 1]]).bool()).tolist() == [0b10000001, 0b10000000]


def test_bits_of_a_transposed_mask_are_in_its_own_row_order() -> None:
    mask = draw_mask((5, 9), 0.5, 0)
    assert torch.equal(unpack_bits(pack_bits(mask.T), (9, 5)), mask.T)


def test_bits_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(InputError, match="does not fit"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), (5, 5))


@quick
@given(shapes, seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_delta_round_trip_is_exact_in_its_dtype_and_zero_outside_the_mask(
    shape: tuple[int, int], seed: int, dtype: torch.dtype
) -> None:
    mask = draw_mask(shape, 0.3, seed)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 1000))  # dense: the mask must cut it
    packed = SparseDelta.pack(delta, mask, dtype)
    dense = packed.dense()
    assert torch.equal(dense, torch.where(mask, delta.to(dtype).float(), 0.0))
    assert dense.dtype == torch.float32
    assert (dense[~mask] == 0).all()
    assert torch.equal(packed.mask(), mask)
    assert packed.density == pytest.approx(mask.float().mean().item())


@pytest.mark.parametrize("shape", [(1, BLOCK), (3, BLOCK // 2 + 1), (2, BLOCK + 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_of_several_blocks_is_packed_as_in_one_piece(shape: tuple[int, int], dtype: torch.dtype) -> None:
    mask = draw_mask(shape, 0.3, 1)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    packed = SparseDelta.pack(delta, mask, dtype)
    assert torch.equal(packed.bits, pack_bits(mask))
    assert torch.equal(packed.values, delta[mask])
    assert torch.equal(packed.dense(dtype), delta * mask)
    assert torch.equal(torch.cat(list(packed.blocks(dtype))), (delta * mask).flatten())
    assert torch.equal(SparseDelta.pack(delta * mask, dtype=dtype).values, delta[mask & (delta != 0)])


def test_a_transposed_delta_is_packed_in_its_own_row_order() -> None:
    delta = torch.randn((5, 9), generator=torch.Generator().manual_seed(0))
    mask = draw_mask((5, 9), 0.5, 0)
    assert torch.equal(SparseDelta.pack(delta.T, mask.T).dense(), (delta * mask).T)


def test_delta_without_a_mask_keeps_what_survives_rounding() -> None:
    delta = torch.tensor([[1.0, 1e-30, 0.0, -2.0]])
    packed = SparseDelta.pack(delta, dtype=torch.float16)
    assert packed.values.tolist() == [1.0, -2.0]
    assert packed.dense().tolist() == [[1.0, 0.0, 0.0, -2.0]]


def test_delta_keeps_zeros_inside_its_mask() -> None:
    packed = SparseDelta.pack(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert packed.density == 1.0


def test_delta_with_too_few_values_is_refused() -> None:
    packed = SparseDelta.pack(torch.ones(2, 3))
    with pytest.raises(InputError, match="6 entries but there are 5 values"):
        dataclasses.replace(packed, values=packed.values[:5]).dense()


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memories", [1, 2, 3])
def test_loaded_equals_saved_in_everything(tmp_path: Path, memories: int) -> None:
    sm = example(memories=memories)
    back = SideMemory.load(saved(tmp_path / "sm.safetensors", sm))
    assert_same(sm, back)
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "sm.safetensors").read_bytes()


def test_keys_answer_the_same_after_loading(tmp_path: Path) -> None:
    sm = example()
    back = SideMemory.load(str(saved(tmp_path / "sm.safetensors", sm)))  # a str is as good as a Path
    query = torch.randn(6, 12)
    for x, y in zip(sm.keys.nearest(query), back.keys.nearest(query), strict=True):
        assert torch.equal(x, y)


def test_the_same_side_memory_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "a.safetensors"), saved(tmp_path / "b.safetensors")
    assert one.read_bytes() == two.read_bytes()


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from pathlib import Path; from test_memory import example;"
        "example().save(Path(sys.argv[3]))"
    )
    here = Path(__file__).resolve().parent
    for seed in ("1", "2"):
        args = [sys.executable, "-c", code, str(here), str(here.parent), str(tmp_path / seed)]
        subprocess.run(args, check=True, env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "sm.safetensors", example().without_texts())
    assert "là".encode() not in path.read_bytes()
    back = SideMemory.load(path)
    assert [e.id for e in back.edits] == ["e0", "e1"]
    assert [e.prompt for e in back.edits] == [None, None]


def test_unknown_manifest_keys_of_a_newer_minor_version_are_kept(tmp_path: Path) -> None:
    path = saved(tmp_path / "sm.safetensors")
    rewrite(path, lambda m, t: m.update(format_version="4.7", novelty={"x": [1, {"y": 2}]}))
    back = SideMemory.load(path)
    assert back.extra == {"novelty": {"x": [1, {"y": 2}]}}
    back.save(tmp_path / "again")
    assert load_tensors(tmp_path / "again")[1]["novelty"] == {"x": [1, {"y": 2}]}
    assert_same(back, SideMemory.load(tmp_path / "again"))


@pytest.mark.parametrize(
    "where",
    [
        lambda m: m["site"],
        lambda m: m["content_rule"],
        lambda m: m["memories"][0],
        lambda m: m["edits"][0],
        lambda m: m["base"],
    ],
    ids=["site", "content_rule", "memory", "edit", "base"],
)
def test_unknown_nested_keys_are_tolerated(tmp_path: Path, where: Callable[[Any], dict]) -> None:
    path = saved(tmp_path / "sm.safetensors")
    rewrite(path, lambda m, t: where(m).update(novelty=1))
    assert SideMemory.load(path).site == example().site


def test_unknown_tensors_are_tolerated(tmp_path: Path) -> None:
    path = saved(tmp_path / "sm.safetensors")
    rewrite(path, lambda m, t: t.update(novelty=torch.ones(2)))
    assert_same(SideMemory.load(path), example())


@pytest.mark.parametrize("version", ["5.0", "5", "10.3", "3.9"])
def test_another_major_version_is_refused(tmp_path: Path, version: str) -> None:
    path = saved(tmp_path / "sm.safetensors")
    rewrite(path, lambda m, t: m.update(format_version=version))
    with pytest.raises(InputError, match="format version") as e:
        SideMemory.load(path)
    assert_actionable(e, path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole").read_bytes()
    path = tmp_path / "sm.safetensors"
    for n in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError) as e:
            SideMemory.load(path)
        assert_actionable(e, path)


def _text(path: Path) -> None:
    path.write_text("prompt,target\nhello,world\n")


def _nothing(path: Path) -> None:
    pass


def _folder(path: Path) -> None:
    path.mkdir()


def _plain_weights(path: Path) -> None:
    save_file({"w": torch.ones(2)}, path)


def _other_format(path: Path) -> None:
    save_tensors(path, {"w": torch.ones(2)}, {"format": "wise-shard", "format_version": "1.0"})


def _manifest(text: str) -> Callable[[Path], None]:
    return lambda path: save_file({"w": torch.ones(2)}, path, metadata={METADATA_KEY: text})


@pytest.mark.parametrize(
    "make",
    [_text, _nothing, _folder, _plain_weights, _other_format, *map(_manifest, ("{", "[1]", '"x"', "null", "{}"))],
    ids=["text", "missing", "folder", "plain weights", "other format", "half", "list", "string", "null", "empty"],
)
def test_what_is_no_side_memory_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "sm.safetensors"
    make(path)
    with pytest.raises(InputError) as e:
        SideMemory.load(path)
    assert_actionable(e, path)


def _no_tensor(name: str) -> Callable[[dict, dict], Any]:
    return lambda m, t: t.pop(name) is None or None


@pytest.mark.parametrize(
    "change",
    [
        _no_tensor("memory.0.values"),
        _no_tensor("memory.1.mask"),
        _no_tensor("keys.owner"),
        lambda m, t: m.pop("site") is None or None,
        lambda m, t: m["site"].pop("path") is None or None,
        lambda m, t: m.update(site=3),
        lambda m, t: m.update(memories=["x"]),
        lambda m, t: m.update(edits=[1]),
        lambda m, t: m.update(content_rule=None),
        lambda m, t: m.update(base=None),
    ],
    ids=["values", "mask", "owner", "no site", "site path", "site 3", "memories", "edits", "rule", "base"],
)
def test_a_side_memory_with_parts_missing_is_refused(tmp_path: Path, change: Callable[[dict, dict], Any]) -> None:
    path = saved(tmp_path / "sm.safetensors")
    rewrite(path, change)
    with pytest.raises(InputError) as e:
        SideMemory.load(path)
    assert_actionable(e, path)


# -- writing -----------------------------------------------------------------------------------------------------------


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OutputError, match="No space left") as e:
        write_bytes(path, b"new" * 1000)
    monkeypatch.undo()
    assert_actionable(e, path)
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["x.bin"]


def test_an_interrupt_while_writing_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["x.bin"]


def test_a_written_file_is_alone_in_its_folder_and_parents_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.bin"
    write_bytes(path, b"1")
    write_bytes(path, b"22")
    assert path.read_bytes() == b"22"
    assert entries(path.parent) == ["x.bin"]


@pytest.mark.parametrize("writer", [write_bytes, write_json, append_line, saved, ensure_writable])
def test_a_path_below_a_file_cannot_be_written(tmp_path: Path, writer: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "sub" / "out"
    value = {write_bytes: (b"x",), write_json: ({},), append_line: ({},)}.get(writer, ())
    with pytest.raises(OutputError) as e:
        writer(path, *value)
    assert_actionable(e, path)
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_cannot_be_written_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        write_bytes(tmp_path / "out", b"x")
    assert entries(tmp_path) == ["out"]


@pytest.mark.parametrize("path", [".", "/", ""])
def test_a_path_without_a_name_cannot_be_written(path: str) -> None:
    with pytest.raises(OutputError):
        write_bytes(Path(path), b"x")


def test_ensure_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "new")
    assert entries(tmp_path / "new") == []


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": "é"})
    assert read_json(path) == {"a": "é", "b": 1}
    for damage in (b'{"a": ', b"\xff\xfe"):
        path.write_bytes(damage)
        with pytest.raises(InputError) as e:
            read_json(path)
        assert_actionable(e, path)
    with pytest.raises(InputError, match="Cannot read"):
        read_json(tmp_path / "missing.json")


def test_lines_are_appended(tmp_path: Path) -> None:
    for i in range(3):
        append_line(tmp_path / "log.jsonl", {"i": i})
    assert [json.loads(x)["i"] for x in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2]


# -- keys --------------------------------------------------------------------------------------------------------------


def facts_in_noise(facts: int, wordings: int, width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [N, width] that differ between facts in the first half of the axes and within facts in the other half."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.zeros(facts, width)
    centres[:, : width // 2] = torch.randn(facts, width // 2, generator=g)
    group = torch.arange(facts).repeat_interleave(wordings)
    noise = 0.05 * torch.randn(len(group), width, generator=g)
    noise[:, width // 2 :] *= 40
    return centres[group] + noise, group


def test_a_key_space_is_reproducible() -> None:
    h, group = facts_in_noise(10, 3)
    one, two = KeySpace.fit(h, group, 8), KeySpace.fit(h.clone(), group, 8)
    assert torch.equal(one.projection, two.projection)
    assert one.rank == 8
    torch.testing.assert_close(one(h).square().sum(1).mean(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("n", "rank", "kept"), [(5, 16, 4), (40, 16, 12), (40, 3, 3)])
def test_a_key_space_keeps_no_more_directions_than_there_are(n: int, rank: int, kept: int) -> None:
    h = torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    for group in (torch.full((n,), -1), torch.arange(n) // 2):
        fit = KeySpace.fit(h, group, rank)
        assert fit.rank == kept
        assert fit(h).isfinite().all()


def test_a_key_space_brings_wordings_of_a_fact_together_where_plain_distance_does_not() -> None:
    h, group = facts_in_noise(20, 4)
    new, new_group = facts_in_noise(20, 4, seed=1)
    plain = torch.nn.functional.normalize(new - h.mean(0), dim=-1)

    def right(z: torch.Tensor) -> float:
        """Share of points whose nearest other point is a wording of the same fact."""
        nearest = alike(z, z).fill_diagonal_(-torch.inf).argmax(1)
        return float((new_group[nearest] == new_group).float().mean())

    assert right(KeySpace.fit(h, group, 6)(new)) > 0.95
    assert right(plain) < 0.5


@given(st.floats(0.01, 100), seeds)
@quick
def test_a_key_space_does_not_see_the_scale_of_the_stream(scale: float, seed: int) -> None:
    h, group = facts_in_noise(12, 3, seed=seed % 1000)
    a, b = KeySpace.fit(h, group, 6)(h), KeySpace.fit(h * scale, group, 6)(h * scale)
    torch.testing.assert_close(alike(a, a), alike(b, b), atol=2e-2, rtol=0)


@pytest.mark.parametrize("scale", [1e-5, 1e6])
def test_a_stream_of_any_scale_has_keys(scale: float) -> None:
    h, group = facts_in_noise(12, 3)
    h[:, 3] += 7.0  # a coordinate far from zero in all prompts, as large models have them
    space = KeySpace.fit(h * scale, group, 6)
    store = KeyStore.of(space, space(h * scale), torch.arange(len(h)), torch.zeros(len(h)))
    best, edit = store.nearest(h * scale)
    assert torch.equal(edit, torch.arange(len(h)))
    torch.testing.assert_close(best, torch.ones(len(h)), atol=2e-2, rtol=0)


def test_groups_of_one_prompt_are_no_wordings() -> None:
    h = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    alone = KeySpace.fit(h, torch.full((30,), -1), 8)
    assert torch.equal(KeySpace.fit(h, torch.arange(30), 8).projection, alone.projection)


@given(st.integers(0, 6), st.integers(1, 9), st.floats(1e-30, 1e30), seeds)
@quick
def test_keys_in_8_bits_are_off_by_half_a_step_at_most(n: int, r: int, size: float, seed: int) -> None:
    x = torch.randn(n, r, generator=torch.Generator().manual_seed(seed)) * size
    if n:
        x[0] = 0.0
    whole, step = to_int8(x, 1)
    assert (whole.dtype, whole.shape, step.shape) == (torch.int8, x.shape, (n,))
    assert ((whole.float() * step[:, None] - x).abs() <= 0.501 * step[:, None]).all()
    assert not whole[:1].any()
    across, steps = to_int8(x.T, 0)
    assert torch.equal(across.T, whole)
    assert torch.equal(steps, step)


def test_a_key_is_nearest_to_itself() -> None:
    h = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    space = KeySpace.fit(h, torch.full((30,), -1), 12)
    store = KeyStore.of(space, space(h), torch.arange(30) // 2, torch.zeros(15))
    found, edit = store.nearest(h)
    assert torch.equal(edit, torch.arange(30) // 2)
    torch.testing.assert_close(found, torch.ones(30), atol=1e-2, rtol=0)


def test_a_crowded_edit_claims_less() -> None:
    h = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    space = KeySpace.fit(h, torch.full((30,), -1), 12)
    vectors = space(h).half()
    store = KeyStore.of(space, vectors[:2], torch.arange(2), torch.tensor([0.0, 0.8]))
    plain = alike(space(h), vectors[:2].float())
    torch.testing.assert_close(store.scores(h), plain - torch.tensor([0.0, 0.4]), atol=1e-2, rtol=0)


def test_crowding_is_the_nearest_ordinary_prompt() -> None:
    keys, ordinary = torch.eye(3), torch.tensor([[0.5, 1.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(crowding(keys, ordinary), torch.tensor([1.0, 1 - (1 / 8) ** 0.5, 0.0]))
    assert torch.equal(crowding(keys, ordinary[:0]), torch.zeros(3))


def test_an_indicator_follows_the_activations_and_not_the_prompts_ids() -> None:
    elsewhere = torch.device("meta")  # as where layers and embeddings are on two devices
    a, delta = torch.ones(2, 3, 8, device=elsewhere), torch.ones(4, 8, device=elsewhere)
    found = activation_indicator(a, torch.ones(2, 3, dtype=torch.bool), delta)
    assert found.device == elsewhere
    assert found.dtype == torch.float32
    assert found.shape == (2,)
