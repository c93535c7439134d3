"""scripts/gpu_report.py, rehearsed on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def report(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "gpu_report.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_rehearsal_measures_every_part_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    words = ("--rehearse", "--out", str(tmp_path))
    first = report(*words, "--part", "1")
    assert first.returncode == 0, first.stdout + first.stderr
    before = json.loads((tmp_path / "report.json").read_text())["figures"]
    assert {"tests", "speed: default", "profile", "start: cold", "start: warm"} == set(before)
    path = tmp_path / "report.json"
    broken = json.loads(path.read_text())
    broken["figures"]["profile"] = {"error": "stopped after 60 s"}
    path.write_text(json.dumps(broken))

    rest = report(*words)
    assert rest.returncode == 0, rest.stdout + rest.stderr
    figures = json.loads(path.read_text())["figures"]
    assert not [name for name, row in figures.items() if "error" in row], rest.stdout
    assert figures["speed: default"] == before["speed: default"]
    profile = figures["profile"]
    assert profile["groups"]["convolutions"] > 0
    assert sum(profile["groups"].values()) < 3 * profile["step_ms"]
    curve = figures["cifar10"]["curve"]
    assert [point["cur_nimg"] for point in curve] == [8, 16, 28]  # of 2, 4 and 7 minutes
    assert len(list((tmp_path / "cifar10").glob("fakes-*.png"))) >= 7

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu_report -->\nold\n<!-- end of gpu_report -->\nafter\n")
    assert report("--out", str(tmp_path), "--into", str(page)).returncode == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text
    assert f"| speed: default | {figures['speed: default']['img_per_s']:,.0f} |" in text


def test_a_measurement_that_fails_or_hangs_costs_only_itself(tmp_path: Path) -> None:
    code = """if True:
        import json, os, pathlib, sys, time
        import gpu_report
        from gpu_report import Step, take
        out = pathlib.Path(sys.argv[1])
        def fail(): raise RuntimeError("no kernel image")
        steps = [Step("hangs", 1, lambda: time.sleep(60)), Step("dies", 9, lambda: os._exit(3))]
        steps += [Step("fails", 9, fail), Step("works", 9, lambda: {"img_per_s": 5.0})]
        found = {step.name: take(step, out, step.seconds) for step in steps}
        print(json.dumps(found))
        print(gpu_report.to_markdown({"machine": "a machine", "figures": found}))
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS)
    found = json.loads(result.stdout.splitlines()[0])
    assert found["hangs"]["error"] == "stopped after 1 s"
    assert "exit code 3" in found["dies"]["error"]
    assert found["fails"]["error"] == "RuntimeError: no kernel image; see fails.log"
    assert found["works"]["img_per_s"] == 5
    assert "- hangs: stopped after 1 s" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    result = report("--part", "1")
    assert result.returncode == 2
    assert "no GPU is visible; --rehearse runs tiny sizes on a CPU" in result.stderr
