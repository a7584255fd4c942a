"""Folders of images: names, metadata, exactness, resuming, and what happens to what is broken."""

from __future__ import annotations

import errno
import itertools
import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from sklearn.datasets import load_digits

from abjure import _files, cli
from abjure.errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from abjure.protect import Certificate, ClassPerturbation, maximize_bayes_error, protect_images, read_folder

STEPS = {"steps": 4, "progress": False, "certificate_subsamples": 0, "certificate_draws": 32}


def pictures(per_class=6, side=16, classes=(3, 8)):
    digits = load_digits()
    for c in classes:
        for i, image in enumerate(digits.images[digits.target == c][:per_class]):
            grey = np.kron(image / 16 * 255, np.ones((side // 8, side // 8))).astype(np.uint8)
            yield f"{c}", f"{c}_{i:02d}", grey


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "in"
    for folder, name, grey in pictures():
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(root / folder / f"{name}.png")
    return root


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def changes(root, out):
    for path in sorted(root.rglob("*.png")):
        before = np.asarray(Image.open(path)).astype(int)
        yield np.abs(np.asarray(Image.open(out / path.relative_to(root))).astype(int) - before).max()


def test_a_folder_is_written_as_it_is_named(source, tmp_path):
    out = tmp_path / "out"
    found = protect_images(source, out, epsilon=16 / 255, **STEPS)
    assert {p.relative_to(source) for p in source.rglob("*.png")} == {
        p.relative_to(out) for p in out.rglob("*.png") if p.name != "panels.png"
    }
    assert set(changes(source, out)) <= set(range(17))
    assert max(changes(source, out)) == found.largest_level > 8
    assert found.images == found.written == 12
    folder, again = read_folder(source), read_folder(out)
    np.testing.assert_array_equal(again.pixels, found.protected.x)
    certificate = Certificate.load(out / "certificate.json")
    assert certificate.holds
    assert certificate.verify(again.pixels, folder.pixels)
    manifest = json.loads((out / "protect.json").read_text())
    assert manifest["files"]["3/3_00.png"] == "3/3_00.png"
    assert manifest["classes"] == ["3", "8"]
    panel = np.asarray(Image.open(out / "panels.png"))
    assert panel.shape[0] > 3 * 64
    assert not (out / ".abjure-protect").exists()
    assert "12 images" in str(found)


def test_colour_transparency_palettes_and_metadata_are_kept(tmp_path):
    root = tmp_path / "in"
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("Author", "somebody")
    chunks.add_itxt("Title", "Täuschung", "de", "Titel")
    icc = b"\0" * 128 + b"profile"
    for c in "ab":
        (root / c).mkdir(parents=True)
        for i in range(4):
            rgb = rng.integers(0, 256, (8, 10, 3)).astype(np.uint8)
            alpha = rng.integers(0, 256, (8, 10, 1)).astype(np.uint8)
            Image.fromarray(np.concatenate([rgb, alpha], axis=2)).save(
                root / c / f"{i}.png", exif=exif, icc_profile=icc, pnginfo=chunks, dpi=(300, 300)
            )
        Image.fromarray(rgb).quantize(16).save(root / c / "palette.png")
        Image.fromarray(rgb).save(root / c / "photo.jpg", exif=exif, comment=b"hello", quality=90)
        Image.fromarray(rgb).save(root / c / "0.jpeg")
    out = tmp_path / "out"
    found = protect_images(root, out, **STEPS)
    assert found.largest_level <= 8
    # There is a 0.png, so 0.jpeg keeps its suffix.
    assert sorted(p.name for p in (out / "a").iterdir()) == [
        "0.jpeg.png", "0.png", "1.png", "2.png", "3.png", "palette.png", "photo.png",
    ]  # fmt: skip
    with Image.open(root / "a" / "1.png") as old, Image.open(out / "a" / "1.png") as new:
        new.load()
        assert new.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(new)[..., 3], np.asarray(old)[..., 3])
        change = np.abs(np.asarray(new)[..., :3].astype(int) - np.asarray(old)[..., :3])
        assert 0 < change.max() <= 8
        assert new.text["Author"] == "somebody"
        assert new.text["Title"] == "Täuschung"
        assert new.text["Title"].lang == "de"
        assert new.info["icc_profile"] == icc
        assert new.getexif()[0x010E] == "a description"
        assert round(new.info["dpi"][0]) == 300
    with Image.open(out / "b" / "photo.png") as new:
        assert new.getexif()[0x010E] == "a description"
        assert new.text["Comment"] == "hello"
    with Image.open(root / "b" / "palette.png") as old, Image.open(out / "b" / "palette.png") as new:
        assert new.mode == "RGB"
        assert np.abs(np.asarray(new).astype(int) - np.asarray(old.convert("RGB"))).max() <= 8


def test_jpeg_warns_and_says_what_it_did(source, tmp_path):
    with pytest.warns(UserWarning, match="JPEG rounds away"):
        found = protect_images(source, tmp_path / "out", format="jpeg", quality=40, **STEPS)
    assert found.lossy
    assert sorted(p.suffix for p in (tmp_path / "out" / "3").iterdir()) == [".jpg"] * 6
    assert found.largest_level > 8
    assert "JPEG" in str(found)


@pytest.mark.filterwarnings("ignore:format. JPEG")
@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_an_interrupted_run_leaves_valid_files_and_goes_on(source, tmp_path, monkeypatch, format):
    whole = tmp_path / "whole"
    protect_images(source, whole, format=format, **STEPS)
    out, real, count = tmp_path / "out", _files.os.replace, 0

    def interrupted(a, b):
        nonlocal count
        count += ".abjure" not in str(b)
        if count == 6:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(_files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        protect_images(source, out, format=format, **STEPS)
    monkeypatch.undo()
    written = [p for p in out.rglob("*") if p.suffix in (".png", ".jpg")]
    assert len(written) == 5
    for path in written:
        Image.open(path).load()
    assert not [p for p in out.rglob(".*") if p.is_file()]
    with pytest.raises(ArgumentError, match="resume"):
        protect_images(source, out, format=format, **STEPS)
    with pytest.raises(ArgumentError, match="options"):
        protect_images(source, out, format=format, resume=True, epsilon=4 / 255, **STEPS)
    # A file that somebody damaged since is written again.
    if format == "png":
        written[0].write_bytes(written[0].read_bytes()[:40])
    monkeypatch.setattr("abjure.protect.images.maximize_bayes_error", None)
    found = protect_images(source, out, format=format, resume=True, **STEPS)
    monkeypatch.undo()
    assert found.written == (8 if format == "png" else 7)
    assert files(out) == files(whole)
    # A complete run has nothing left to do.
    assert protect_images(source, out, format=format, resume=True, **STEPS).written == 0


def test_a_full_disk_is_said_and_what_is_written_is_valid(source, tmp_path, monkeypatch):
    out, real, count = tmp_path / "out", _files.os.fsync, 0

    def full(descriptor):
        nonlocal count
        count += 1
        if count == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(ArgumentError, match=r"5 of 12 images are written and valid.*No space left.*resume"):
        protect_images(source, out, **STEPS)
    monkeypatch.undo()
    assert set(itertools.islice(changes(source / "3", out / "3"), 5)) <= set(range(9))
    assert not [p for p in out.rglob(".*") if p.is_file()]
    assert protect_images(source, out, resume=True, **STEPS).written == 7


def test_broken_images_are_named(source, tmp_path):
    (source / "3" / "3_02.png").write_bytes((source / "3" / "3_02.png").read_bytes()[:60])
    (source / "8" / "text.jpg").write_text("no image")
    with pytest.raises(ArgumentError, match=r"3/3_02\.png.* and 1 more"):
        protect_images(source, tmp_path / "out", **STEPS)
    assert not (tmp_path / "out").exists()
    found = protect_images(source, tmp_path / "out", broken="skip", **STEPS)
    assert set(found.skipped) == {"3/3_02.png", "8/text.jpg"}
    assert found.images == 11
    assert set(json.loads((tmp_path / "out" / "protect.json").read_text())["skipped"]) == set(found.skipped)
    assert "left out: 8/text.jpg" in str(found)


def test_input_that_cannot_be_used(source, tmp_path):
    out = tmp_path / "out"
    Image.new("L", (20, 16)).save(source / "8" / "wide.png")
    with pytest.raises(ShapeError, match=r"16×16 in '3/3_00\.png' and 20×16 in '8/wide\.png'"):
        protect_images(source, out, **STEPS)
    (source / "8" / "wide.png").unlink()
    Image.fromarray(np.zeros((16, 16), dtype=np.uint16)).save(source / "8" / "deep.png")
    with pytest.raises(ArgumentError, match=r"8 bits.*deep\.png"):
        protect_images(source, out, **STEPS)
    (source / "8" / "deep.png").unlink()
    for bad in (
        {"out": source / "3"}, {"out": source}, {"out": source.parent}, {"out": source / "3" / "3_00.png"},
        {"format": "gif"}, {"quality": 0}, {"broken": "ignore"}, {"panels": -1}, {"epsilon": 0}, {"source": out},
        {"source": source / "3"},
    ):  # fmt: skip
        arguments = {"source": source, "out": out, **STEPS, **bad}
        with pytest.raises(ArgumentError):
            protect_images(arguments.pop("source"), arguments.pop("out"), **arguments)
        assert not out.exists(), bad
    other = tmp_path / "other"
    other.mkdir()
    (other / "note.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="a run was begun in"):
        protect_images(source, other, resume=True, **STEPS)
    for path in (source / "3").iterdir():
        path.unlink()
    with pytest.raises(DegenerateError, match="two classes"):
        protect_images(source, out, **STEPS)


def test_the_command(source, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["protect", "images", str(source), str(out), "--epsilon", "8/255", "--steps", "4", "--quiet", "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 12
    assert found["largest_level"] <= 8
    assert cli.main(command) == 2
    assert "resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    (source / "3" / "bad.png").write_bytes(b"")
    assert cli.main([*command[:3], str(tmp_path / "two"), *command[4:]]) == 2
    assert "bad.png" in capsys.readouterr().err
    assert cli.main([*command[:3], str(tmp_path / "two"), *command[4:-1], "--broken", "skip"]) == 1
    assert "left out: 3/bad.png" in capsys.readouterr().out
    for epsilon in ("8/0", "much", "-1"):
        with pytest.raises(SystemExit):
            cli.main([*command[:4], "--epsilon", epsilon])


def class_wise():
    digits = load_digits()
    pick = np.isin(digits.target, [1, 4])
    x = (digits.images[pick] / 16 * 255).astype(np.uint8)[:80]
    return maximize_bayes_error(x, digits.target[pick][:80], epsilon=24 / 255, steps=5)


def test_a_transform_adds_what_the_run_added(tmp_path):
    import torch

    protected = class_wise()
    transform = ClassPerturbation.of(protected)
    assert transform.delta.shape == (2, 8, 8, 1)
    for i in range(0, 80, 7):
        image, label = protected.clean[i], protected.labels[i]
        np.testing.assert_array_equal(transform(image, label), protected.x[i])
        picture = transform(Image.fromarray(image), label)
        assert isinstance(picture, Image.Image)
        np.testing.assert_array_equal(np.asarray(picture), protected.x[i])
        tensor = torch.from_numpy(image.copy())[None]
        assert torch.equal(transform(tensor, label)[0], torch.from_numpy(protected.x[i]))
        unit = transform(tensor.float() / 255, torch.tensor(label))
        np.testing.assert_allclose(unit[0].numpy() * 255, protected.x[i], atol=1e-4)
    assert transform.transforms(image, label)[1] == label
    batch = transform.on_examples("img", "y")({"img": [image, image], "y": [1, 4], "more": 3})
    assert batch["more"] == 3
    assert not np.array_equal(batch["img"][0], batch["img"][1])
    one = transform.on_examples()({"image": image, "label": label})
    np.testing.assert_array_equal(one["image"], protected.x[i])
    colour = transform(np.stack([image] * 3, axis=-1), label)
    np.testing.assert_array_equal(colour[..., 1], protected.x[i])
    transform.save(tmp_path / "delta.safetensors")
    again = ClassPerturbation.load(tmp_path / "delta.safetensors")
    np.testing.assert_array_equal(again.delta, transform.delta)
    np.testing.assert_array_equal(again.classes, [1, 4])


def test_a_transform_refuses_what_does_not_fit(tmp_path):
    import torch

    protected = class_wise()
    transform = ClassPerturbation.of(protected)
    image = protected.clean[0]
    with pytest.raises(ArgumentError, match="label"):
        transform(image, 7)
    with pytest.raises(ShapeError):
        transform(image[:4], 1)
    with pytest.raises(DTypeError):
        transform(image.astype(np.float32), 1)
    with pytest.raises(DTypeError):
        transform(torch.zeros(1, 8, 8, dtype=torch.int32), 1)
    with pytest.raises(ShapeError):
        transform(torch.zeros(8, 8, 1), 1)
    with pytest.raises(ShapeError):
        ClassPerturbation(np.zeros((2, 8, 8), dtype=np.int16), [0, 1])
    with pytest.raises(DTypeError):
        ClassPerturbation(np.zeros((2, 8, 8, 1)), [0, 1])
    with pytest.raises(ShapeError):
        ClassPerturbation(np.zeros((2, 8, 8, 1), dtype=np.int16), [0])
    with pytest.raises(ArgumentError):
        ClassPerturbation.load(tmp_path / "none")
    per_sample = maximize_bayes_error(protected.clean, protected.labels, per="sample", epsilon=24 / 255, steps=5)
    with pytest.raises(ArgumentError, match="one perturbation per class"):
        ClassPerturbation.of(per_sample)
    real = maximize_bayes_error(protected.clean / np.float32(255), protected.labels, steps=2)
    with pytest.raises(DTypeError):
        ClassPerturbation.of(real)
