import os
import pickle
import random
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import (
    DataError,
    draw_face,
    draw_faces,
    draw_images,
    load_data,
    place_images,
    read_image,
    save_grid,
    to_float,
)


def picture(width, height, seed=0):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), np.uint8))


def pixel(image):
    """Any Pillow image of one colour -> that colour, read back by read_image."""
    return read_image(image, 4)[:, 1, 1].tolist()


# ----------------------------------------------------------------------------------------------------- reading files


def test_a_wide_image_is_cropped_to_its_centre(tmp_path):
    image = Image.new("RGB", (90, 30), "red")
    image.paste("lime", (30, 0, 60, 30))
    image.save(tmp_path / "a.png")
    green = read_image(tmp_path / "a.png", 10)
    assert (green[:, :, 1:-1] == torch.tensor([0, 255, 0])[:, None, None]).all() and (green[1] > 230).all()


def test_resizing_is_antialiased_and_a_square_of_the_right_size_is_untouched(tmp_path):
    board = np.indices((128, 128)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    assert (read_image(tmp_path / "board.png", 16).float() - 127.5).abs().max() < 8
    picture(16, 16).save(tmp_path / "same.png")
    assert torch.equal(
        read_image(tmp_path / "same.png", 16).permute(1, 2, 0), torch.from_numpy(np.array(picture(16, 16)))
    )


@pytest.mark.parametrize(
    "mode, colour, name, expected",
    [
        ("L", 90, "a.png", [90, 90, 90]),
        ("1", 1, "a.bmp", [255, 255, 255]),
        ("RGBA", (200, 0, 0, 0), "a.png", [255, 255, 255]),
        ("RGBA", (0, 0, 0, 128), "a.webp", [127, 127, 127]),
        ("LA", (0, 128), "a.png", [127, 127, 127]),
        ("I;16", 65000, "a.png", [253, 253, 253]),
        ("CMYK", (0, 255, 255, 0), "a.jpg", [255, 0, 0]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, name, expected):
    Image.new(mode, (8, 8), colour).save(tmp_path / name)
    np.testing.assert_allclose(pixel(tmp_path / name), expected, atol=0 if name == "a.png" else 2)


def test_a_palette_with_a_transparent_colour_stands_over_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert pixel(tmp_path / "opaque.png") == [10, 20, 30] and pixel(tmp_path / "clear.png") == [255, 255, 255]


def test_a_gif_gives_its_first_frame_and_exif_turns_a_photo_upright(tmp_path):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert pixel(tmp_path / "a.gif") == [255, 0, 0]
    half = Image.new("RGB", (8, 8), "black")
    half.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the top goes to the right
    half.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png", 8)[0, 4].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize("side", [40, 100, 1024])
def test_a_jpeg_that_is_decoded_small_is_close_to_one_decoded_whole(side, tmp_path):
    image = picture(16, 16).resize((side, side), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95, subsampling=0)
    image.save(tmp_path / "a.png")
    difference = read_image(tmp_path / "a.jpg", 32).float() - read_image(tmp_path / "a.png", 32).float()
    assert difference.abs().mean() < 4


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_searched_and_split(photos):
    data = load_data(str(photos), 16)
    assert data.train.shape == (27, 3, 16, 16) and data.heldout.shape == (3, 3, 16, 16)
    assert data.train.dtype == data.heldout.dtype == torch.uint8
    assert data.attributes == () and data.train_labels.shape == (27, 0) and data.heldout_labels.shape == (3, 0)
    for path, image in zip(data.paths, torch.cat([data.train, data.heldout]), strict=True):
        assert torch.equal(common.read_image(path, 16), image)
    everything = {bytes(image.numpy()) for image in torch.cat([data.train, data.heldout])}
    assert everything == {bytes(read_image(path, 16).contiguous().numpy()) for path in photos.rglob("*.png")}
    assert all(torch.equal(a, b) for a, b in zip(data[:2], load_data(str(photos), 16)[:2]))


def test_a_data_set_takes_one_byte_a_value(photos):
    data = load_data(str(photos), 16)
    assert data.train.untyped_storage().nbytes() == 30 * 3 * 16 * 16
    assert data.train.untyped_storage().data_ptr() == data.heldout.untyped_storage().data_ptr()


def test_files_that_cannot_be_read_are_skipped_counted_and_named_with_the_reason(tmp_path, capsys, monkeypatch):
    for i in range(25):
        picture(20 + i, 30, i).save(tmp_path / f"{i}.{('png', 'JPG', 'webp', 'bmp', 'gif')[i % 5]}")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "1.JPG").read_bytes()[:200])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not read")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    picture(80, 60).save(tmp_path / "panorama.png")
    data = load_data(str(tmp_path), 16)
    read = [read_image(path, 16) for path in tmp_path.iterdir() if path.stem.isdigit()]
    assert len(read) == 25 and {bytes(image.contiguous().numpy()) for image in read} == {
        bytes(image.numpy()) for image in torch.cat([data.train, data.heldout])
    }
    error = capsys.readouterr().err
    assert "reading 30 files" in error and "skipped 5" in error
    named = re.findall(r"(\w+)\.\w+ \((.*?)\)(?:,|\n)", error.split("skipped 5")[1])
    reasons = dict.fromkeys(("broken", "empty", "notes"), "cannot identify")
    reasons |= {"cut": "runcated", "panorama": "exceeds limit"}
    assert len(named) == 3 and all(reasons[name] in reason for name, reason in named), error


def test_linked_folders_are_searched(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for i in range(30):
        picture(8, 8, i).save(tmp_path / ("data", "elsewhere")[i % 2] / f"{i}.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    names = [path.name for path in load_data(str(tmp_path / "data"), 8).paths]
    assert sorted(names) == sorted(f"{i}.png" for i in range(30))


def test_the_split_and_the_checksum_depend_on_the_images_alone(photos, tmp_path, monkeypatch):
    data = load_data(str(photos), 16)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: ((a, b, c[::-1]) for a, b, c in walk(*args, **options)))
    shutil.copytree(photos, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for name in ("copy", "./copy/", tmp_path / "copy"):
        same = load_data(str(name), 16)
        assert same.checksum == data.checksum and torch.equal(same.heldout, data.heldout)
    picture(8, 8).save(tmp_path / "copy" / "0 first.png")
    assert load_data("copy", 16).checksum != data.checksum


def test_what_is_no_data_set_is_refused_in_one_line(tmp_path, photos):
    picture(8, 8).save(tmp_path / "one.png")
    for name, words in (
        (tmp_path / "missing", "not a folder"),
        ("celebA", "faces, cifar10 or mnist"),
        (tmp_path / "one.png", "not a folder"),
        (tmp_path, "1 readable images: give 20 or more"),
        (photos / "more", "20 or more"),
    ):
        with pytest.raises(DataError, match=words) as error:
            load_data(str(name), 16)
        assert "\n" not in str(error.value) and str(name) in str(error.value)


# ------------------------------------------------------------------------------------------------------- attributes


@pytest.fixture
def labelled(tmp_path):
    """25 images of one grey each, in a folder inside: image i is i * 10 and has the attributes i odd, i > 9."""
    (tmp_path / "images").mkdir()
    for i in range(25):
        Image.new("L", (8, 8), i * 10).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def assert_labels_belong_to_their_images(data):
    assert data.attributes == ("odd", "large") and data.train_labels.dtype == torch.bool
    for images, labels in ((data.train, data.train_labels), (data.heldout, data.heldout_labels)):
        numbers = images[:, 0, 0, 0] // 10
        assert torch.equal(labels, torch.stack([numbers % 2 == 1, numbers > 9], 1))


CSV = ["\ufefffile,odd,large", *(f"{i}.png,{i % 2},{int(i > 9)}" for i in range(25)), ""]
KAGGLE = ["image_id,odd,large", *(f"{i}.png,{1 if i % 2 else -1},{1 if i > 9 else -1}" for i in range(25))]
CELEBA = ["25", "odd large ", *(f"{i}.png  {1 if i % 2 else -1} {1 if i > 9 else -1}" for i in range(25))]


@pytest.mark.parametrize(
    "place, data, lines",
    [
        ("attributes.csv", ".", CSV),
        ("images/attributes.csv", "images", CSV),
        ("list_attr_celeba.txt", "images", CELEBA),  # torchvision's
        ("list_attr_celeba.csv", "images", KAGGLE),
    ],
)
def test_attributes_of_a_folder(labelled, place, data, lines):
    (labelled / place).write_text("\n".join(lines), "utf-8")
    assert_labels_belong_to_their_images(load_data(str(labelled / data), 8))


@pytest.mark.parametrize(
    "folder, file, lines",
    [("Img", "Anno/list_attr_celeba.txt", CELEBA), ("img_align_celeba", "list_attr_celeba.csv", KAGGLE)],
)
def test_celeba_as_its_two_archives_are(labelled, folder, file, lines):
    (labelled / folder).mkdir()
    (labelled / "images").rename(labelled / folder / "img_align_celeba")
    (labelled / file).parent.mkdir(exist_ok=True)
    (labelled / file).write_text("\n".join(lines))
    for data in (".", folder, f"{folder}/img_align_celeba"):
        assert_labels_belong_to_their_images(load_data(str(labelled / data), 8))


def test_two_images_of_one_name_share_no_row(labelled, capsys):
    (labelled / "more").mkdir()
    for i in range(5):
        (labelled / "images" / f"{i}.png").rename(labelled / "more" / f"{i + 20}.png")
    Image.new("L", (8, 8), 200).save(labelled / "images" / "20.png")
    rows = [f"images/{i}.png,{i % 2},{int(i > 9)}" for i in range(5, 25)]
    more = [f"more/{i + 20}.png,{i % 2},0" for i in range(5)]
    (labelled / "attributes.csv").write_text("\n".join(["file,odd,large", *rows, *more]))
    assert_labels_belong_to_their_images(load_data(str(labelled), 8))
    (labelled / "attributes.csv").write_text("\n".join(["file,odd,large", *(f"{i}.png,1,1" for i in range(25))]))
    assert load_data(str(labelled), 8).attributes == ()
    assert "for 10 of 25 images: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("file,odd\n0.png,1", "for 24 of 25 images: "),
        ("file,odd\na.png,1", "for 25 of 25 images: "),
        ("file,odd\n" + "\n".join(f"{i}.png,{i % 2 * 7}" for i in range(25)), "1 values 0, 1 or -1 for 12 of 25"),
        ("f,odd\n0.png", "1 values 0, 1 or -1 for 25"),
        ("", "0 values 0, 1 or -1 for 25"),
    ],
)
def test_attributes_that_do_not_fit_are_left_out_with_a_line_that_says_why(labelled, capsys, text, words):
    (labelled / "attributes.csv").write_text(text)
    data = load_data(str(labelled), 8)
    assert data.attributes == () and data.train_labels.shape == (23, 0) and data.heldout_labels.shape == (2, 0)
    (line,) = [line for line in capsys.readouterr().err.split("\n") if "without attributes" in line]
    assert str(labelled / "attributes.csv") in line and words in line


# ------------------------------------------------------------------------------------------------------ torchvision


def test_mnist_from_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = np.random.RandomState(0).randint(0, 256, (40, 28, 28), np.uint8)
    classes = np.arange(40, dtype=np.uint8) % 10
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 40, 28, 28) + digits.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 40) + classes.tobytes())
    data = load_data("mnist", 28)
    assert data.train.shape == (36, 3, 28, 28) and data.heldout.shape == (4, 3, 28, 28) and len(data.attributes) == 10
    for images, labels in ((data.train, data.train_labels), (data.heldout, data.heldout_labels)):
        for image, label in zip(images, labels):
            (number,) = [i for i in range(40) if (digits[i] == image[0].numpy()).all()]
            assert torch.equal(image[0], image[2]) and label.nonzero().item() == number % 10


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = np.random.RandomState(0).randint(0, 256, (50, 3, 32, 32), np.uint8)
    for i in range(5):
        batch = {"data": images[10 * i : 10 * i + 10].reshape(10, -1), "labels": list(range(10))}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    data = load_data("cifar10", 32)
    assert data.train.shape == (45, 3, 32, 32) and data.attributes == tuple("abcdefghij")
    for image, label in zip(data.train, data.train_labels):
        (number,) = [i for i in range(50) if (images[i] == image.numpy()).all()]
        assert label.nonzero().item() == number % 10
    assert load_data("cifar10", 16).train.shape == (45, 3, 16, 16)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_failed_download_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DataError, match="cannot be downloaded") as error:
        load_data(name, 16)
    assert "\n" not in str(error.value) and "give a folder of images" in str(error.value)


# ------------------------------------------------------------------------------------------------------------ faces


def test_faces_are_the_same_for_the_same_seed_and_each_its_own():
    images, names, labels = draw_faces(40, 32)
    again, _, _ = draw_faces(20, 32)
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8 and labels.shape == (40, len(names))
    assert torch.equal(images[:20], again) and not torch.equal(again, draw_faces(20, 32, seed=1)[0])
    assert len({bytes(image.numpy()) for image in images}) == 40


def test_faces_have_ten_attributes_that_come_and_go():
    _, names, labels = draw_faces(300, 8)
    assert len(set(names)) == len(names) >= 10 and "head" not in names
    assert ((labels.float().mean(0) > 0.05) & (labels.float().mean(0) < 0.7)).all()
    hair = labels[:, [names.index(name) for name in common.HAIR]].sum(1)
    assert torch.equal(hair, 1 - labels[:, names.index("bald")].long())


@pytest.mark.parametrize("name", common.ODDS)
def test_an_attribute_can_be_seen_at_16_pixels(name, monkeypatch):
    with_it, without = [], []
    for odds, faces in ((1, with_it), (0, without)):
        monkeypatch.setitem(common.ODDS, name, odds)
        for seed in range(20):
            image, parts = draw_face(random.Random(seed), 16)
            assert (name in parts) == bool(odds) or (name in ("long_hair", "bangs") and "bald" in parts)
            faces.append(np.array(image, float))
    change = np.abs(np.array(with_it) - without).max((1, 2, 3))
    assert np.median(change) > 25, change


def test_faces_is_a_data_set_by_name(monkeypatch):
    drawn = []
    monkeypatch.setattr(common, "draw_faces", lambda count, *args: drawn.append(count) or draw_faces(100, *args))
    data = load_data("faces", 16)
    assert drawn == [10_000] and data.train.shape == (90, 3, 16, 16) and data.heldout_labels.shape[0] == 10
    assert data.attributes == common.FACE_ATTRIBUTES


# ---------------------------------------------------------------------------------------------------- drawing batches


def test_images_are_drawn_with_replacement_and_all_alike():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    torch.manual_seed(0)
    drawn = draw_images(images, 2000, torch.device("cpu"))
    assert drawn.shape == (2000, 3, 2, 2) and torch.equal(drawn, drawn[:, :1, :1, :1].expand_as(drawn))
    counts = drawn[:, 0, 0, 0].bincount(minlength=10)
    assert len(counts) == 10 and 150 < counts.min() and counts.max() < 250
    torch.manual_seed(0)
    assert torch.equal(drawn, images[torch.randint(10, (2000,))])


def test_images_from_elsewhere_are_copied():
    drawn = draw_images(torch.zeros(10, 3, 2, 2, dtype=torch.uint8), 5, torch.device("meta"))
    assert drawn.shape == (5, 3, 2, 2) and drawn.device.type == "meta"


def test_images_that_fill_half_of_a_device_stay_where_they_are(monkeypatch):
    images = torch.zeros(10, 3, 2, 2, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (239, 10**9))
    assert place_images(images, torch.device("cuda", 3)) is images
    assert place_images(images, torch.device("cpu")) is images
    assert place_images(images, torch.device("meta")).device.type == "meta"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (240, 10**9))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: (self, device))
    assert place_images(images, torch.device("cuda", 3)) == (images, torch.device("cuda", 3))


# ----------------------------------------------------------------------------------------------------------- saving


def test_to_float_spans_the_range():
    x = to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert x.dtype == torch.float32 and x.tolist() == pytest.approx([-1, -0.6, 1])


def tiles(path, size, across, down):
    """The picture's tiles as [down, across, size, size, 3]; checks that nothing but white stands between them."""
    picture = np.array(Image.open(path))
    assert picture.shape == (down * (size + 4) + 4, across * (size + 4) + 4, 3)
    rows, columns = np.ix_(*[[i * (size + 4) + 4 + j for i in range(n) for j in range(size)] for n in (down, across)])
    inside = picture[rows, columns].reshape(down, size, across, size, 3).swapaxes(1, 2)
    picture[rows, columns] = 255
    assert (picture == 255).all()
    return inside


def test_a_grid_shows_every_value_enlarged_without_blur(tmp_path):
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    save_grid(tmp_path / "a.png", to_float(images), groups_per_row=3)
    shown = tiles(tmp_path / "a.png", 64, 3, 2)
    expected = images.numpy().transpose(0, 2, 3, 1).repeat(4, 1).repeat(4, 2)
    assert (shown.reshape(6, 64, 64, 3)[:5] == expected).all() and (shown[1, 2] == 255).all()


def test_values_outside_the_range_are_clipped_and_the_images_left_alone(tmp_path):
    images = torch.tensor([-7.0, 7.0]).view(2, 1, 1, 1).expand(2, 3, 64, 64).clone().requires_grad_()
    save_grid(tmp_path / "a.png", images)
    shown = tiles(tmp_path / "a.png", 64, 2, 1)
    assert (shown[0, 0] == 0).all() and (shown[0, 1] == 255).all() and images.detach().abs().min() == 7


def test_pairs_stand_side_by_side_without_a_gap(tmp_path):
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    save_grid(tmp_path / "a.png", x, -x, groups_per_row=1)
    for i in range(2):
        shown = np.array(Image.open(tmp_path / "a.png"), int)[4 + 68 * i : 68 + 68 * i, 4:132]
        left, right = shown[:, :64], shown[:, 64:]
        assert np.abs(left + right - 255).max() <= 1 and np.abs(left - right).max() > 50


def test_captions_stand_in_the_top_left_corner_of_their_tile_alone(tmp_path):
    x = torch.zeros(2, 3, 64, 64)
    save_grid(tmp_path / "plain.png", x, x, groups_per_row=2)
    save_grid(tmp_path / "a.png", x, x, groups_per_row=2, captions=[(), ["97%"]])
    plain, shown = np.array(Image.open(tmp_path / "plain.png")), np.array(Image.open(tmp_path / "a.png"))
    y, x = np.nonzero((plain != shown).any(-1))
    assert 4 <= y.min() <= y.max() < 20 and 68 <= x.min() <= x.max() < 100 and len(y) > 50
    assert shown[y, x].min() == 0 and shown[y, x].max() > 200
