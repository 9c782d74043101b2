"""Do imports go one way, and is the way from an image to the loss short?"""

import import_metric
import pytest

# A room, or the file `image_io`, may import the ones before it. Other files outside of any room
# import no room.
ROOMS = (
    'core',
    'image_io',
    'protocols',
    'parallel',
    'nn',
    'tokenizers',
    'text',
    'losses',
    'families',
    'checkpoint',
    'convert',
    'data',
    'sampling',
    'evaluation',
    'training',
    'plan',
    'bench',
    'studies',
    'verify',
    'commands',
)
ENTRANCES = ('star_jax', 'star_jax.__main__', 'star_jax.cli')  # they may import every room


@pytest.fixture(scope='module')
def graph():
    return import_metric.import_graph()


def room_of(module: str) -> int:
    """The place of a module's room among ROOMS; -1 for a module outside of any room."""
    name = module.removeprefix('star_jax.').split('.')[0]
    return ROOMS.index(name) if name in ROOMS else -1


def test_imports_go_one_way(graph):
    upwards = [
        f'{module} imports {imported}'
        for module in graph.keys() - set(ENTRANCES)
        for imported in graph[module]
        if room_of(imported) > room_of(module)
    ]
    assert not upwards


def test_every_room_has_a_place_in_the_order(graph):
    packages = {path.parent.name for path in import_metric.modules().values()}
    assert packages - set(ROOMS) == {'star_jax'}


def test_way_from_the_training_program_is_short(graph):
    program = 'star_jax.training.program'
    assert len(import_metric.longest_path(graph, program)) <= 12
    assert len(import_metric.reachable(graph, program)) <= 60
