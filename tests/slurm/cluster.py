"""A real Slurm on this machine, for tests: `with Cluster(folder) as cluster: cluster.sbatch(...)`.

Every node has a network, host name, process numbers and /dev/shm of its own (Linux namespaces), so
two nodes share only the disk, as on a cluster. Nothing has a name outside: each namespace lives by
one `bash`, which ends when this process closes its end of a pipe or dies, and takes all with it.
Needs root and Debian's packages (see `missing`); touches no configuration of the machine.

The daemons run without cgroups, so claimed hardware is only counted: ask for what the true cluster
has, whatever this machine has.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import time
from pathlib import Path

APT = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
NETWORK = "10.77.0"
CONTROLLER = f"{NETWORK}.254"
SILENCE = 10  # seconds until a node that does not answer is DOWN
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

# TaskPlugin, ProctrackType and the like: what runs in any container, without cgroups or systemd.
CONF = """\
ClusterName=tests
SlurmctldHost=controller({controller})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={silence}
KillWait=5
JobRequeue=1
MinJobAge=86400
GresTypes=gpu
"""


def missing() -> str:
    """Why no cluster can be started here, with the fix; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: {APT}"
    if os.geteuid():
        return "a Slurm of one's own needs root (network namespaces, daemons that start jobs)"
    return ""


class Namespace:
    """A network, host name and process table that live until `end`."""

    def __init__(self, name: str, folder: Path, script: str):
        words = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
        script = f"""
            read -r _ || exit # go on once the network is there
            hostname {name}; ip link set lo up
            mount --bind {folder}/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm
            {script}
            read -r _ # until the pipe is closed; process 1 takes the others with it
        """
        with open(folder / "log" / f"{name}.out", "ab") as log:
            self.process = subprocess.Popen(
                [*words, "--kill-child", "bash", "-c", script],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ours = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{self.process.pid}/ns/net") != ours, name)

    def enter(self, *words: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *words]

    def mount(self, *words: str) -> None:
        """Change what this node alone sees of the disk."""
        self._in_mounts("mount", *words)

    def unmount(self, path: Path) -> None:
        self._in_mounts("umount", str(path))

    def _in_mounts(self, *words: str) -> None:
        space = f"--mount=/proc/{self.process.pid}/ns/mnt"
        subprocess.run(["nsenter", space, *words], check=True)

    def ip(self, command: str) -> None:
        subprocess.run(self.enter("ip", *command.split()), check=True)

    def go(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Cluster:
    """`gpus`: those of each node, of which there are as many as numbers."""

    def __init__(self, folder: Path, gpus: list[int], cpus: int = 64):
        self.folder, self.gpus, self.cpus = folder, gpus, cpus
        self.names = [f"node{i + 1}" for i in range(len(gpus))]
        self.nodes: dict[str, Namespace] = {}

    def __enter__(self) -> Cluster:
        for name in ("state", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o711)
        self._configure()
        self.controller = Namespace("controller", self.folder, self._control())
        self.controller.ip("link add bridge type bridge")
        self.controller.ip(f"addr add {CONTROLLER}/24 dev bridge")
        self.controller.ip("link set bridge up")
        self.controller.go()
        for name in self.names:
            self.power_on(name)
        return self

    def __exit__(self, *_) -> None:
        for namespace in [*self.nodes.values(), self.controller]:
            namespace.end()

    def _configure(self) -> None:
        conf = CONF.format(folder=self.folder, controller=CONTROLLER, silence=SILENCE)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        hosts = ["127.0.0.1 localhost", f"{CONTROLLER} controller"]
        devices = []
        for number, (name, gpus) in enumerate(zip(self.names, self.gpus, strict=True), 1):
            address = f"{NETWORK}.{number}"
            gres = f" Gres=gpu:{gpus}" if gpus else ""
            has = f"CPUs={self.cpus} RealMemory={memory}{gres}"
            conf += f"NodeName={name} NodeAddr={address} {has}\n"
            hosts.append(f"{address} {name}")
            if gpus:
                devices.append(f"NodeName={name} Name=gpu File={self.folder}/gpu[0-{gpus - 1}]")
        for number in range(max(self.gpus)):  # null devices pose as GPUs
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        conf += "PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text("\n".join(devices) + "\n")
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        # slurmd wants one of these though nothing here uses it; "disabled" is newer than 23.02
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True).stdout
        old = re.search(r" (2[0-2]\.|23\.02)", version)
        plugin = "cgroup/v1" if old else "disabled"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)

    def _control(self) -> str:
        munge = self.folder / "munge"
        return f"""
            export SLURM_CONF={self.folder}/slurm.conf
            munged --force --key-file={munge}/key --socket={munge}/socket --pid-file={munge}/pid \
                --log-file={munge}/log --seed-file={munge}/seed
            slurmctld -D -i </dev/null &
        """

    # ------------------------------------------------------------------ nodes

    def power_on(self, name: str) -> None:
        """Start a node, and wait until it takes jobs."""
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        start = f"SLURM_CONF={self.folder}/slurm.conf slurmd -D -N {name} </dev/null &"
        node = self.nodes[name] = Namespace(name, self.folder, start)
        self.controller.ip(f"link add {name} type veth peer name eth0 netns {node.process.pid}")
        self.controller.ip(f"link set {name} master bridge up")
        node.ip(f"addr add {NETWORK}.{self.names.index(name) + 1}/24 dev eth0")
        node.ip("link set eth0 up")
        node.go()

    def power_off(self, name: str) -> None:
        """The line goes dead and everything on the node is gone in the same moment."""
        self.controller.ip(f"link del {name}")
        self.nodes[name].end()

    def wait_idle(self, limit: float = 40.0) -> None:
        def idle() -> bool:
            states = self.run("sinfo", "-hN", "-o", "%T", check=False).stdout.split()
            return states == ["idle"] * len(self.names)

        until(idle, "idle nodes", limit, self.logs)

    def logs(self) -> str:
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-2000:]}" for f in files)

    # ------------------------------------------------------------------ jobs

    def run(self, *words: str, check: bool = True, **more) -> subprocess.CompletedProcess:
        """A Slurm command, as from a login node."""
        env = more.pop("env", None) or dict(os.environ)
        env |= {"SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(  # without the controller a client tries for very long
            self.controller.enter("timeout", "20", *words),
            **({"capture_output": True, "text": True, "env": env} | more),
        )
        assert done.returncode == 0 or not check, (words, done.stdout, done.stderr)
        return done

    def sbatch(self, *words: str, cwd: Path, **env: str) -> str:
        """Submit; the job's number."""
        base = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, env=base | env)
        return done.stdout.strip().split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts, NodeList..."""
        text = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, number: str, *states: str, limit: float = 240.0) -> dict[str, str]:
        """Until the job is in one of `states` (given none, until it has ended)."""
        wanted = set(states) or FINAL
        job: dict[str, str] = {}

        def there() -> bool:
            job.update(self.job(number))
            gone_wrong = job["JobState"] in FINAL - wanted
            assert not gone_wrong, f"job {number} is {job['JobState']}:\n{self.logs()}"
            return job["JobState"] in wanted

        until(there, f"job {number} to be {' or '.join(wanted)}", limit, lambda: str(job))
        return job

    def wait_turn(self, number: str, turn: int, limit: float = 180.0, **changes: str) -> None:
        """Until a requeued job runs again; `changes`: to the job while it waits.

        Slurm lets it wait for two minutes, until its old credentials expire. They are told from new
        ones by the second, so a moment must pass: nodes refuse a job that starts in the same one.
        """
        words = [f"{name}={value}" for name, value in {"StartTime": "now+3", **changes}.items()]
        told = 0.0

        def runs() -> bool:
            nonlocal told
            job = self.job(number)
            assert job["JobState"] not in FINAL, f"{job}\n{self.logs()}"
            if job["JobState"] == "PENDING" and time.monotonic() - told > 10:
                told = time.monotonic()
                self.run("scontrol", "update", f"JobId={number}", *words, check=False)
            return job["JobState"] == "RUNNING" and job["Restarts"] == str(turn)

        until(runs, f"turn {turn} of job {number}", limit, lambda: str(self.job(number)))


def until(true, what: str, limit: float = 20.0, explain=lambda: "", interval: float = 0.1) -> None:
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, f"waited {limit:.0f} s for {what}: {explain()}"
        time.sleep(interval)
