"""Are programs compiled in the background in order, and left out when a command ends?"""

import subprocess
import sys

import pytest

from star_jax.training.compile_ahead import CompileAhead

ENDING = """
import time
from star_jax.training.compile_ahead import CompileAhead

def compile_program():
    print('compiled', flush=True)
    time.sleep(0.5)

ahead = CompileAhead()
ahead.start({name: compile_program for name in 'abc'})
time.sleep(0.1)
"""


def test_programs_are_compiled_in_order_and_errors_come_to_who_waits():
    done, ahead = [], CompileAhead()

    def fail() -> None:
        raise ValueError('out of memory')

    assert not ahead.started
    ahead.start({'b': lambda: done.append('b'), 'x': fail, 'a': lambda: done.append('a')})
    ahead.wait('a')
    assert ahead.started and done == ['b', 'a']
    ahead.wait('b')
    with pytest.raises(ValueError, match='out of memory'):
        ahead.wait('x')


def test_a_command_that_ends_compiles_nothing_more():
    done = subprocess.run([sys.executable, '-c', ENDING], capture_output=True, text=True)
    assert done.stdout.count('compiled') == 1 and not done.stderr
