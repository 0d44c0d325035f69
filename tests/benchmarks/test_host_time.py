"""Host time: what is called is what is named, and ratios are to plain of the same repeat."""

import functools

import host_time
import recording_driver
import torch

from moram_kernels import retrieve


def test_calls_launch_the_kernels_of_the_path_they_name():
    with recording_driver.recorded() as driver:
        timed = host_time.calls()
        found = {}
        for name, one in timed.items():
            driver.launched.clear()
            with host_time.forced(one.path):
                one.call()
            found[name] = list(driver.launched)
        first = {name: names[:1] for name, names in found.items()}
        single = host_time.launches(timed)
        for name, one in single.items():
            driver.launched.clear()
            one.call()
            assert driver.launched, name
    assert all(not names for name, names in found.items() if name.endswith("plain"))
    assert found["inference, resident"] == ["_resident_kernel"]
    assert found["inference, decode"] == ["_score_kernel", "_decode_kernel"]
    assert found["inference, split-dense"][1:] == ["_select_kernel", "_aggregate_kernel"]
    assert found["inference, split-gather"][1:] == ["_select_kernel", "_gather_kernel"]
    assert first["forward and backward, resident"] == ["_resident_kernel"]
    assert len(found["forward and backward, resident"]) == 6
    assert {"one launch_resident", "one launch_bank_gradient"} <= set(single)


def test_ratios_are_of_the_same_repeat():
    call = functools.partial(int)
    timed = {"plain": host_time.Timed(call), "ours": host_time.Timed(call, "plain")}
    samples = {"plain": [10.0, 20.0, 400.0], "ours": [5.0, 30.0, 100.0]}
    # The ratios are 0.5, 1.5 and 0.25; that of the medians would be 1.5.
    lines = list(host_time.report(timed, samples))
    assert lines[2:] == ["| plain | 20.0 |  |", "| ours | 30.0 | 0.50 |"]


def test_the_recorder_notes_grid_stream_and_arguments():
    x = torch.ones(4, 16)
    with recording_driver.recorded() as driver:
        driver.stream = 7
        retrieve(x, x, x, host_time.SelfActivation(4), backend="triton")
    grid, stream, arguments = driver.arguments[0]
    assert stream == 7 and len(grid) == 3
    assert arguments[0].data_ptr() == x.data_ptr()


def test_the_program_prints_a_row_for_every_call(capsys):
    host_time.main(["--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| call | us | to plain |"
    assert any(line.startswith("| one launch_decode | ") for line in lines)
