"""Do killed commands give the results of undisturbed ones when they are given again?"""

from pathlib import Path

import kill_loops
import pytest


@pytest.fixture(scope='module')
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('kills') / 'inputs'
    kill_loops.write_inputs(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('command', kill_loops.COMMANDS)
def test_killed_command_ends_as_if_undisturbed(command, inputs, tmp_path):
    outcome = kill_loops.loop(command, inputs, tmp_path)
    assert outcome.ended >= outcome.points // 2
