"""Are programs compiled in the background in order, and left out when a command ends?"""

import subprocess
import sys

import pytest

from star_jax.training.compile_ahead import CompileAhead

ENDING = """
import threading
import time
from star_jax.training.compile_ahead import CompileAhead

begun = threading.Event()

def compile_program():
    print('compiled', flush=True)
    begun.set()
    time.sleep(0.5)

ahead = CompileAhead()
ahead.start({name: compile_program for name in 'abc'})
begun.wait()
"""


def test_programs_are_compiled_in_order_and_waiting_raises_their_errors():
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
