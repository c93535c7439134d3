"""`vgan-train model=attn data=celeba` with local copies of both sources."""

import os
import subprocess
import sys
from pathlib import Path

import hub_sets_server
import numpy as np
from PIL import Image
from test_data import write_faces

from vgan.data import celeba_mirror
from vgan.runs import checkpoint

COMMAND = [
    "model=attn", "data=celeba", "size=xs", "data.resolution=16", "batch_size=4",
    "total_kimg=0.008", "compile=false", "device=cpu", "run_dir=run",
]  # fmt: skip
TRAIN = "from vgan.cli import train_main; train_main()"


def train(folder: Path, code: str, *overrides: str, **environment: str) -> str:
    """Run vgan-train in a folder without a network; return what it prints."""
    nowhere = "http://127.0.0.1:9"  # where nothing listens
    environment = {"HTTPS_PROXY": nowhere, "NO_PROXY": "127.0.0.1", **environment}
    environment |= {"HF_HOME": str(folder / "home"), "VGAN_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMAND, *overrides],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.load(checkpoint.find(folder / "run"))["cur_nimg"] == 8
    return done.stdout


def test_from_the_mirror(tmp_path: Path) -> None:
    files = tmp_path / "root" / celeba_mirror.REPO
    write_faces(files / celeba_mirror.FOLDER, 4)
    with hub_sets_server.serve(tmp_path / "root") as (url, _):
        out = train(tmp_path, TRAIN, "data.conditions=all", HF_ENDPOINT=url)
    assert f"Trying the mirror {celeba_mirror.REPO}" in out
    assert "celeba: 8 images of 16 px, 3 channels, 2 conditions" in out


def test_from_files_in_the_layout_of_torchvision(tmp_path: Path) -> None:
    """Its MD5 sums are those of the real files, which are not here."""
    folder = tmp_path / "data" / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, 7)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (40 * i, 0, 0)).save(folder / "img_align_celeba" / name)
    table = [f"{name} {i % 2 * 2 - 1} {i // 3 * 2 - 1}" for i, name in enumerate(names)]
    headed = f"{len(names)}\nSmiling Male\n" + "\n".join(table) + "\n"
    (folder / "list_attr_celeba.txt").write_text(headed)
    (folder / "list_bbox_celeba.txt").write_text(f"{headed.replace('Smiling', 'image_id Smiling')}")
    (folder / "list_landmarks_align_celeba.txt").write_text(headed)
    for file, values in (
        ("identity_CelebA", range(6)),
        ("list_eval_partition", [0, 0, 0, 0, 1, 2]),
    ):
        lines = [f"{name} {value}" for name, value in zip(names, values)]
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n")
    code = "import torchvision; torchvision.datasets.CelebA._check_integrity = lambda self: True; "
    out = train(tmp_path, code + TRAIN, "data.attributes=[Smiling]")
    assert "celeba: 4 images of 16 px, 3 channels, 2 classes" in out
    (packed,) = (tmp_path / "cache").glob("celeba-*")
    assert np.load(packed / "labels.npy").tolist() == [0, 1, 0, 1]
