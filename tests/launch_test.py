"""What do the launch scripts run, and do they bring a run to its end?

`gcloud`, `kubectl`, `sbatch`, `srun` and `scontrol` are stubs on the PATH that write down their
words. The one for TPUs also plays the cloud: it copies to and runs in a folder.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from star_jax.errors import UserError
from star_jax.parallel import flags

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SCRIPTS = ('node', 'worker', 'tpu', 'tpu_watch', 'slurm', 'gke')
CONFIG = 'configs/star_d16_256.py'
AWKWARD = ('--note', """it's "a b" $HOME $(id) \\ & é""")
RUN = (CONFIG, '--out', '/shared/d 16', *AWKWARD)
QUEUED = ('gcloud', 'compute', 'tpus', 'queued-resources')
NEW_LINE, WORD = '\x1e', '\x1f'

STUB = """#!/usr/bin/env bash
{ printf '%s\\x1f' "${0##*/}" "$@"; printf '\\x1e'; } >>"$CALLS"
if [[ "$*" == *--filename=-* ]]; then cat >"$CALLS.stdin"; fi
exit "${STATUS:-0}"
"""


class Machine:
    """A PATH with stubs, and what was called."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder, folder / 'bin', folder / 'calls'
        self.bin.mkdir(parents=True)
        self.environment = {
            'PATH': f'{self.bin}:{os.environ["PATH"]}',
            'HOME': str(folder),
            'CALLS': str(self.log),
        }
        for name in ('gcloud', 'kubectl', 'sbatch', 'srun', 'scontrol'):
            self.stub(name, STUB)

    def stub(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def bash(
        self, *words: object, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            ['bash', *map(str, words)],
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def calls(self) -> list[list[str]]:
        """The words of every call so far."""
        text = self.log.read_text() if self.log.exists() else ''
        return [line.split(WORD)[:-1] for line in text.split(NEW_LINE)[:-1]]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path / 'machine')


def complaint(done: subprocess.CompletedProcess) -> str:
    """The one sentence of a script that was given something wrong."""
    assert done.returncode == 2, done
    assert done.stderr.count('\n') == 1 and not done.stdout, done
    return done.stderr


# As they are written.


def test_scripts_are_clean_and_short():
    scripts = [path.relative_to(ROOT) for path in sorted(LAUNCH.glob('*.sh'))]
    checker = shutil.which('shellcheck', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    assert checker, "shellcheck is missing: pip install -e '.[test]'"
    subprocess.run([checker, '--external-sources', *scripts, '.ci/run'], cwd=ROOT, check=True)
    long = [str(path) for path in LAUNCH.iterdir() if len(path.read_text().splitlines()) > 40]
    assert not long


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_teaches_with_an_example(machine, name):
    done = machine.bash(LAUNCH / f'{name}.sh', '--help')
    assert done.returncode == 0 and not done.stderr
    assert f'bash launch/{name}.sh' in done.stdout and 'configs/star_' in done.stdout
    assert 'set -euo' not in done.stdout and '#' not in done.stdout


# Given something wrong: one sentence, 2, and nothing is called.


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (('tpu',), 'give ACTION NAME ZONE'),
        (('tpu', 'create', 'd16'), 'give ACTION NAME ZONE'),
        (('tpu', 'create', 'd16', 'us-east5-a', 'h100-8'), "'h100-8' is no TPU"),
        (('tpu', 'explode', 'd16', 'us-east5-a'), "'explode' is none of"),
        (('tpu', 'start', 'd16', 'us-east5-a', 'configs/none.py'), "'configs/none.py' is no file"),
        (('tpu', 'start', 'd16', 'us-east5-a', CONFIG), 'needs --out'),
        (
            ('tpu', 'start', 'd16', 'us-east5-a', CONFIG, '--out', 'runs/x'),
            'is no place that all machines share',
        ),
        (('tpu', 'start', 'd16', 'us-east5-a', CONFIG, '--out', 'gs://b/x'), 'is no place'),
        (('tpu_watch', 'd16'), 'give NAME ZONE TYPE'),
        (('tpu_watch', 'd16', 'us-east5-a', 'v5p'), "'v5p' is no TPU"),
        (('tpu_watch', 'd16', 'us-east5-a', 'v5p-8', '--spot'), 'begins with its config'),
        (('slurm',), 'begins with its config'),
        (('slurm', '--nodes=2', CONFIG), 'needs --out'),
        (('slurm', '--nodes=2', CONFIG, '--out='), 'needs --out'),
        (('gke', 'start'), 'give an action and a name'),
        (('gke', 'start', 'd16', 'image', 'h100'), "'h100' is no pool"),
        (('gke', 'start', 'd16', 'image', 'v5e:1x1', 'runs', *RUN), "'v5e:1x1' is no pool"),
        (('gke', 'start', 'd16', 'image', 'v5e:4x4', 'runs', CONFIG), 'needs --out'),
        (('gke', 'explode', 'd16'), "'explode' is no action"),
        (('node', 'h100'), "'h100' is no platform"),
        (('node', 'gpu', CONFIG), 'needs --out'),
        (('worker', 'explode'), "'explode' is no action"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(machine, words, said):
    name, *rest = words
    error = complaint(machine.bash(LAUNCH / f'{name}.sh', *rest))
    assert error.startswith(f'{name}.sh: ') and said in error
    assert machine.calls() == []


# TPUs by queued resources.


def tpu(machine, *words, **environment):
    return machine.bash(LAUNCH / 'tpu.sh', *words, **environment)


@pytest.mark.parametrize(
    ('kind', 'accelerator', 'runtime', 'nodes'),
    [
        ('v5p-128', 'v5p-128', 'v2-alpha-tpuv5', ['--node-id=d30']),
        ('v5e-256', 'v5litepod-256', 'v2-alpha-tpuv5-lite', ['--node-id=d30']),
        ('1xv6e-8', 'v6e-8', 'v2-alpha-tpuv6e', ['--node-id=d30']),
        (
            '2xv6e-256',
            'v6e-256',
            'v2-alpha-tpuv6e',
            ['--node-count=2', '--node-prefix=d30'],
        ),
    ],
)
def test_a_slice_or_several_are_asked_for(machine, kind, accelerator, runtime, nodes):
    done = tpu(machine, 'create', 'd30', 'us-east5-a', kind, '--spot', '--labels=a=b c')
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [
        [
            *QUEUED,
            'create',
            'd30',
            f'--accelerator-type={accelerator}',
            f'--runtime-version={runtime}',
            *nodes,
            '--spot',
            '--labels=a=b c',
            '--zone=us-east5-a',
        ]
    ]


def test_a_run_starts_on_all_workers_with_its_words_intact(machine):
    assert tpu(machine, 'start', 'd16', 'us-east5-a', *RUN).returncode == 0
    ((*before, command, zone),) = machine.calls()
    assert before == [
        *QUEUED,
        'ssh',
        'd16',
        '--node=all',
        '--worker=all',
    ]
    assert zone == '--zone=us-east5-a'
    remote = command.removeprefix('--command=')
    assert remote.startswith('bash star_jax/launch/worker.sh start ')
    said = machine.bash('-c', f"printf '%s\\x1f' {remote}").stdout
    assert said.split(WORD)[3:-1] == list(RUN)


def test_the_other_actions_on_tpus(machine):
    for action in ('stop', 'logs', 'last', 'delete'):
        assert tpu(machine, action, 'd16', 'us-east5-a').returncode == 0
    stop, logs, last, delete = (call[4:] for call in machine.calls())
    assert stop[:4] == ['ssh', 'd16', '--node=all', '--worker=all']
    assert logs[:4] == last[:4] == ['ssh', 'd16', '--node=0', '--worker=0']
    assert '-F' in logs[4] and '-F' not in last[4]
    assert delete == ['delete', 'd16', '--force', '--quiet', '--zone=us-east5-a']


def test_the_status_of_gcloud_is_passed_on(machine):
    for words in (
        ('create', 'd16', 'z', 'v5p-8'),
        ('start', 'd16', 'z', *RUN),
        ('stop', 'd16', 'z'),
    ):
        assert tpu(machine, *words, STATUS='7').returncode == 7


def test_install_takes_what_is_there_not_what_was_deleted(machine, tmp_path):
    project = tmp_path / 'project'
    shutil.copytree(LAUNCH, project / 'launch')
    (project / '.gitignore').write_text('runs\n')
    for name in ('kept', 'deleted', 'runs'):
        (project / name).write_text(name)
    for words in ('init -q', 'add .'):
        subprocess.run(['git', *words.split()], cwd=project, check=True)
    (project / 'deleted').unlink()
    (project / 'new').write_text('not added yet')
    machine.stub('gcloud', '#!/usr/bin/env bash\n[[ $4 != scp ]] || tar -tzf "$5" >"$CALLS"\n')
    done = machine.bash(project / 'launch/tpu.sh', 'install', 'd16', 'z')
    assert done.returncode == 0, done
    packed = machine.log.read_text().splitlines()
    assert [name for name in packed if '/' not in name] == ['.gitignore', 'kept', 'new']


def test_a_dry_run_prints_what_would_run_and_runs_nothing(machine):
    for script, *words in (
        ('tpu', 'create', 'd16', 'z', 'v5p-8'),
        ('tpu', 'install', 'd16', 'z'),
        ('tpu', 'start', 'd16', 'z', *RUN),
        ('tpu', 'delete', 'd16', 'z'),
        ('tpu_watch', 'd16', 'z', 'v5p-8', '--spot', *RUN),
        ('slurm', '--nodes=2', *RUN),
        ('gke', 'start', 'd16', 'image', 'v5e:4x4', 'runs', *RUN),
        ('gke', 'logs', 'd16'),
        ('node', 'gpu', *RUN),
    ):
        done = machine.bash(LAUNCH / f'{script}.sh', '--dry-run', *words)
        assert done.returncode == 0 and done.stdout, (script, done)
    assert machine.calls() == []
    line = machine.bash(LAUNCH / 'tpu.sh', '--dry-run', 'start', 'd16', 'z', *RUN).stdout
    assert tpu(machine, 'start', 'd16', 'z', *RUN).returncode == 0
    machine.bash('-c', line)  # what was printed does the same
    ran, printed = machine.calls()
    assert ran == printed


# A cloud in a folder: `home` is the VM's, `state` says how the resource stands.

CLOUD = """#!/usr/bin/env bash
{ printf '%s\\x1f' gcloud "$@"; printf '\\x1e'; } >>"$CALLS"
vm="$HOME/vm"
case $4 in
  create) echo ACTIVE >"$HOME/state"; mkdir -p "$vm" ;;
  delete) rm "$HOME/state"; mv "$vm" "$vm.$RANDOM" ;;
  list) cat "$HOME/state" 2>/dev/null || true ;;
  scp) cp "$5" "$vm/star_jax.tar.gz" ;;
  ssh) for word in "$@"; do
      if [[ $word == --command=* ]]; then cd "$vm" && exec bash -c "${word#--command=}"; fi
    done ;;
esac
"""
# Python on the VM: makes environments in which star-jax is PROGRAM.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  '-m uv python find 3.12') echo "$HOME/bin/python3" ;;
  *'-m venv .venv') mkdir -p .venv/bin
    printf '#!/bin/bash\\n' >.venv/bin/pip; chmod +x .venv/bin/pip
    cp "$HOME/program" .venv/bin/python ;;
esac
"""
# Taken away the first time, stopped the second, then it comes to its end.
PROGRAM = """#!/usr/bin/env bash
echo "$*" >>"$HOME/runs"
while (($#)); do [[ $1 == --out ]] && out="$2"; shift; done
case $(wc -l <"$HOME/runs") in
  1) echo SUSPENDED >"$HOME/state"
    for ((i = 0; i < 600; ++i)); do if [[ -d $HOME/vm ]]; then /bin/sleep 0.1; fi; done ;;
  2) ;;
  3) mkdir -p "$out/model" ;;
esac
"""


@pytest.fixture
def cloud(machine) -> Machine:
    machine.stub('gcloud', CLOUD)
    machine.stub('python3', PYTHON)
    machine.stub('sleep', '#!/usr/bin/env bash\nexec /usr/bin/env -i /bin/sleep 0.2\n')
    machine.stub('../program', PROGRAM)
    return machine


def watch(cloud: Machine, *words: str) -> subprocess.CompletedProcess:
    return cloud.bash(LAUNCH / 'tpu_watch.sh', 'd16', 'z', '2xv5e-16', '--spot', CONFIG, *words)


def actions(cloud: Machine) -> list[str]:
    """What was asked of the cloud, other than how it stands."""
    asked = []
    for _, _, _, _, verb, *words in cloud.calls():
        if verb == 'ssh':
            found = re.search(r'worker\.sh (\w+)', ' '.join(words))
            verb = found.group(1) if found else 'unpack'
        asked.append(verb)
    return [verb for verb in asked if verb not in ('list', 'state')]


def test_a_watched_run_comes_to_its_end_through_a_preemption(cloud):
    out = cloud.folder / 'shared' / 'd 16'
    done = watch(cloud, '--out', str(out), '--note', 'a "b"')
    assert done.returncode == 0, done
    ran = (cloud.folder / 'runs').read_text().splitlines()
    assert ran == [f'-m star_jax.parallel.flags tpu train {CONFIG} --out {out} --note a "b"'] * 3
    begin = ['scp', 'unpack', 'install', 'stop', 'start']
    assert actions(cloud) == ['create', *begin, 'delete', 'create', *begin, *begin, 'delete']
    assert not (cloud.folder / 'state').exists()  # nothing is left to pay for


@pytest.mark.parametrize(('status', 'starts'), [(2, 1), (1, 5)])
def test_a_watch_gives_up_a_run_that_fails(cloud, status, starts):
    cloud.stub('../program', f'#!/bin/bash\necho >>"$HOME/runs"; echo why; exit {status}\n')
    done = watch(cloud, '--out', str(cloud.folder / 'out'))
    assert done.returncode == 2 and f'(ended {status})' in done.stderr and 'why' in done.stderr
    assert len((cloud.folder / 'runs').read_text().splitlines()) == starts
    assert not (cloud.folder / 'state').exists()


def test_a_worker_stops_its_run_which_saves(cloud):
    """And a second run is refused while one goes on."""
    out = cloud.folder / 'out'
    saves = 'trap "echo saved; exit 0" TERM; touch "$HOME/ready"; while :; do /bin/sleep 0.1; done'
    cloud.stub('../program', f'#!/usr/bin/env bash\n{saves}\n')

    def say(*words: str) -> subprocess.CompletedProcess:
        return tpu(cloud, *words[:1], 'd16', 'z', *words[1:])

    for words in (('create', 'v6e-8'), ('install',), ('start', CONFIG, '--out', str(out))):
        done = say(*words)
        assert done.returncode == 0, done
    for _ in range(300):
        if (cloud.folder / 'ready').exists():
            break
        time.sleep(0.1)
    assert say('state').stdout == 'ACTIVE running\n'
    assert 'stop it first' in complaint(say('start', CONFIG, '--out', str(out)))
    assert say('stop').returncode == 0
    assert say('state').stdout == 'ACTIVE ended 143\n'
    assert say('last').stdout == 'saved\n'


# SLURM.


def test_a_job_is_submitted(machine):
    words = ('--nodes=4', '--comment=a b', CONFIG, '--out', '/shared/d16', *AWKWARD)
    assert machine.bash(LAUNCH / 'slurm.sh', *words).returncode == 0
    assert machine.calls() == [
        ['sbatch', '--nodes=4', '--comment=a b', 'launch/slurm.sh', *words[2:]]
    ]
    assert machine.bash(LAUNCH / 'slurm.sh', *words, STATUS='3').returncode == 3
    head = (LAUNCH / 'slurm.sh').read_text().split('\nset ')[0]
    for option in ('--requeue', '--signal=TERM@300', '--open-mode=append', '--ntasks-per-node=8'):
        assert re.search(rf'^#SBATCH .*{option}\b', head, re.MULTILINE)


@pytest.mark.parametrize(('status', 'requeued'), [('0', False), ('143', True), ('1', False)])
def test_a_job_that_was_stopped_before_its_end_is_queued_again(machine, status, requeued):
    machine.stub('scontrol', STUB.replace('exit "${STATUS:-0}"', 'exit 0'))
    spooled = shutil.copy(LAUNCH / 'slurm.sh', machine.folder / 'slurm_script')  # as SLURM does
    run = (CONFIG, '--out', '/shared/d16', *AWKWARD)
    job = {'SLURM_JOB_ID': '17', 'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_CPUS_PER_TASK': '12'}
    done = machine.bash(spooled, *run, cwd=machine.folder, STATUS=status, **job)
    assert done.returncode == int(status), done
    srun, *rest = machine.calls()
    assert rest == ([['scontrol', 'requeue', '17']] if requeued else [])
    start = srun.index('bash')
    assert srun[start:] == ['bash', 'launch/node.sh', 'gpu', *run]
    assert {'--kill-on-bad-exit=1', '--cpus-per-task=12', '--gpu-bind=none'} <= set(srun[:start])


# Kubernetes.


def manifest(machine: Machine, pool: str) -> dict:
    done = machine.bash(LAUNCH / 'gke.sh', 'start', 'd16', 'here/star_jax:1', pool, 'runs', *RUN)
    assert done.returncode == 0, done
    assert machine.calls()[-1] == ['kubectl', 'apply', '--filename=-']
    return yaml.safe_load(Path(f'{machine.log}.stdin').read_text())


@pytest.mark.parametrize(
    ('pool', 'slices', 'nodes', 'selector', 'limits', 'platform'),
    [
        ('v5p:4x4x4', 1, 16, ('tpu-v5p-slice', '4x4x4'), {'google.com/tpu': 4}, 'tpu'),
        ('2xv5e:16x16', 2, 64, ('tpu-v5-lite-podslice', '16x16'), {'google.com/tpu': 4}, 'tpu'),
        ('v6e:2x2', 1, 1, ('tpu-v6e-slice', '2x2'), {'google.com/tpu': 4}, 'tpu'),
        ('4xnvidia-h100-80gb:8', 1, 4, ('nvidia-h100-80gb',), {'nvidia.com/gpu': 8}, 'gpu'),
    ],
)
def test_a_jobset_asks_for_its_machines(machine, pool, slices, nodes, selector, limits, platform):
    asked = manifest(machine, pool)
    assert (asked['apiVersion'], asked['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert asked['metadata']['name'] == 'd16'
    (replicated,) = asked['spec']['replicatedJobs']
    job = replicated['template']['spec']
    assert (replicated['replicas'], job['parallelism'], job['completions']) == (
        slices,
        nodes,
        nodes,
    )
    taken, _ = job['podFailurePolicy']['rules']
    assert taken['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
    pod = job['template']['spec']
    assert tuple(pod['nodeSelector'].values()) == selector
    (container,) = pod['containers']
    assert container['image'] == 'here/star_jax:1'
    assert container['resources']['limits'] == limits
    assert {each['name'] for each in pod['volumes']} == {'shared', 'shm'}
    assert pod['volumes'][0]['persistentVolumeClaim'] == {'claimName': 'runs'}
    words = [word.replace('$$(', '$(') for word in container['command']]  # as Kubernetes reads it
    assert words == ['bash', 'launch/node.sh', platform, *RUN]
    processes = {each['name']: each for each in container['env']}
    if platform == 'tpu':
        assert not processes
        return
    assert processes['STAR_JAX_COORDINATOR']['value'] == 'd16-slice-0-0.d16:8476'
    assert processes['STAR_JAX_PROCESSES']['value'] == str(nodes)
    assert 'completion-index' in str(processes['STAR_JAX_PROCESS']['valueFrom'])


def test_a_jobset_is_followed_and_stopped(machine):
    assert machine.bash(LAUNCH / 'gke.sh', 'logs', 'd16').returncode == 0
    assert machine.bash(LAUNCH / 'gke.sh', 'stop', 'd16').returncode == 0
    logs, stop = machine.calls()
    assert logs[:3] == ['kubectl', 'logs', '--follow'] and 'jobset-name=d16' in logs[3]
    assert stop == ['kubectl', 'delete', 'jobset', 'd16']
    assert machine.bash(LAUNCH / 'gke.sh', 'stop', 'd16', STATUS='4').returncode == 4


# One machine.


@pytest.fixture
def clone(machine) -> Path:
    """The scripts beside a Python that is `program`."""
    clone = machine.folder / 'clone'
    shutil.copytree(LAUNCH, clone / 'launch')
    (clone / '.venv/bin').mkdir(parents=True)
    (clone / 'config.py').touch()
    return clone


def program(clone: Path, text: str) -> None:
    path = clone / '.venv/bin/python'
    path.write_text(f'#!/usr/bin/env bash\n{text}\n')
    path.chmod(0o755)


@pytest.mark.parametrize(
    ('does', 'status'),
    [('mkdir -p out/model', 0), ('mkdir -p out', 143), ('exit 2', 2), ('exit 1', 1)],
)
def test_the_status_tells_a_finished_run_from_a_stopped_one(machine, clone, does, status):
    program(clone, f'{{ printf "%s\\x1f" "$@"; printf "\\x1e"; }} >>"$CALLS"; {does}')
    done = machine.bash('launch/node.sh', 'gpu', 'config.py', '--out=out', *AWKWARD, cwd=clone)
    assert done.returncode == status, done
    assert machine.calls() == [
        ['-m', 'star_jax.parallel.flags', 'gpu', 'train', 'config.py', '--out=out', *AWKWARD]
    ]


def test_a_notice_reaches_the_run_which_saves(machine, clone):
    program(clone, 'trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.1; done')
    run = subprocess.Popen(
        ['bash', 'launch/node.sh', 'gpu', 'config.py', '--out', 'out'],
        cwd=clone,
        env=machine.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == 'ready\n'
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[0] == 'saved\n'
    assert run.returncode == 143


# The flags of XLA.


def test_what_a_user_sets_decides():
    given = {'XLA_FLAGS': '--xla_gpu_enable_triton_gemm=true', 'HOME': '/home'}
    both = flags.environment('gpu', given)
    assert both['XLA_FLAGS'].endswith(given['XLA_FLAGS']) and both['HOME'] == '/home'
    assert both['XLA_FLAGS'].startswith(flags.GPU[0])
    assert both['XLA_CLIENT_MEM_FRACTION'] == '0.92'
    assert flags.environment('tpu', {}) == {'LIBTPU_INIT_ARGS': ' '.join(flags.TPU)}
    for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
        given = {name: '0.5'}
        kept = flags.environment('gpu', given)
        assert {n: v for n, v in kept.items() if 'FRACTION' in n} == given
    assert flags.environment('cpu', {}) == flags.ENVIRONMENT['cpu']
    assert flags.environment('cpu', {'GLIBC_TUNABLES': 'x'}) == {'GLIBC_TUNABLES': 'x'}
    with pytest.raises(UserError, match='tpu'):
        flags.environment('npu', {})


def test_xla_knows_every_flag_and_star_jax_starts_with_them():
    """An unknown one would end the process."""
    probe = 'import jax; jax.devices()'
    settings = flags.environment('gpu', os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'})
    subprocess.run([sys.executable, '-c', probe], env=settings, check=True, capture_output=True)
    said = subprocess.run(
        [sys.executable, '-m', 'star_jax.parallel.flags', 'cpu', 'frain'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 2 and "did you mean 'train'" in said.stderr
