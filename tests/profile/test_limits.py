import pytest

from flexgen.base.quantities import GIB, KIB, MIB
from flexgen.errors import CapacityError, OptionError
from flexgen.options import EngineOptions
from flexgen.profile.limits import CardMemory, find_limits

MEMORY_V1 = "30 20 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
UNIFIED = "31 20 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
DISK = "1 0 254:0 / / rw,relatime - ext4 /dev/root rw"


class FakeSystem:
    """A root folder with just the files that are read.  24 GiB of memory, 20 of them available, 500 MiB our own."""

    def __init__(self, root):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {24 * GIB // KIB} kB\nMemFree: 1 kB\nMemAvailable: {20 * GIB // KIB} kB\n")
        status = {"VmSize": 3 * GIB, "VmData": 1 * GIB, "VmRSS": 600 * MIB, "RssAnon": 500 * MIB}
        self.write("proc/self/status", "Name: python\n" + "".join(f"{name}: {size // KIB} kB\n" for name, size in status.items()))
        self.mounts(DISK)
        self.write("proc/self/cgroup", "0::/\n")

    def write(self, path, text):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(str(text))

    def mounts(self, *lines):
        self.write("proc/self/mountinfo", "\n".join(lines) + "\n")

    def version_1(self, folder, *, limit=None, usage=0, inactive_file=0, hierarchical=None):
        base = f"sys/fs/cgroup/memory/{folder}"
        self.write(f"{base}/memory.limit_in_bytes", limit or 9223372036854771712)
        self.write(f"{base}/memory.usage_in_bytes", usage)
        stat = f"cache 5\ntotal_inactive_file {inactive_file}\ntotal_active_file 0\n"
        self.write(f"{base}/memory.stat", stat + (f"hierarchical_memory_limit {hierarchical}\n" if hierarchical else ""))

    def version_2(self, folder, *, most=None, high=None, current=0, file=0):
        base = f"sys/fs/cgroup/{folder}"
        self.write(f"{base}/memory.max", most or "max")
        self.write(f"{base}/memory.high", high or "max")
        self.write(f"{base}/memory.current", current)
        self.write(f"{base}/memory.stat", f"anon 5\ninactive_file {file}\nactive_file 0\nslab_reclaimable 0\n")

    def limits(self, *, rlimits=None, free=100 * GIB, cuda=None, **options):
        return find_limits(
            EngineOptions(**({"device": "cpu"} | options)),
            root=self.root,
            rlimits=rlimits or {},
            disk_space=lambda folder: (free, 200 * GIB),
            cuda_memory=lambda: None if cuda is None else CardMemory(*cuda),
        )


@pytest.fixture
def system(tmp_path):
    return FakeSystem(tmp_path / "root")


def test_without_groups_physical_memory_is_the_limit(system):
    limits = system.limits()
    assert (limits.host_total_bytes, limits.host_total_source) == (24 * GIB, "physical memory")
    # What this process has already is available to it.
    assert limits.host_bytes == int(0.8 * (20 * GIB + 500 * MIB))
    assert limits.host_source == "80% of what is available now (physical memory)"
    assert (limits.device, limits.device_bytes, limits.device_total_bytes) == ("cpu", 0, 0)


# Version 1


def test_version_1_limit(system):
    system.mounts(DISK, MEMORY_V1)
    system.write("proc/self/cgroup", "5:cpu:/box\n4:memory:/box\n0::/\n")
    system.version_1("", usage=3 * GIB)
    system.version_1("box", limit=4 * GIB, usage=2 * GIB, inactive_file=1 * GIB)
    limits = system.limits()
    assert limits.host_total_bytes == 4 * GIB
    assert limits.host_total_source == "control group /sys/fs/cgroup/memory/box (memory.limit_in_bytes)"
    assert limits.host_bytes == int(0.8 * (3 * GIB + 500 * MIB))  # page cache can be had back


def test_version_1_parents_bind_too(system):
    system.mounts(DISK, MEMORY_V1)
    system.write("proc/self/cgroup", "4:memory:/outer/inner\n")
    system.version_1("outer", limit=2 * GIB)
    system.version_1("outer/inner", limit=8 * GIB)
    limits = system.limits()
    assert limits.host_total_bytes == 2 * GIB
    assert "/outer (memory.limit" in limits.host_total_source


def test_version_1_hierarchical_limit_of_parents_that_cannot_be_seen(system):
    system.mounts(DISK, "30 20 0:30 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory")
    system.write("proc/self/cgroup", "4:memory:/docker/abc\n")
    system.version_1("", limit=8 * GIB, hierarchical=3 * GIB)
    limits = system.limits()
    assert limits.host_total_bytes == 3 * GIB
    assert "hierarchical_memory_limit" in limits.host_total_source


def test_version_1_in_a_namespace(system):
    system.mounts(DISK, "30 20 0:30 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory")
    system.write("proc/self/cgroup", "4:memory:/\n")
    system.version_1("", limit=3 * GIB)
    assert system.limits().host_total_bytes == 3 * GIB


def test_a_mount_of_another_controller_is_not_read(system):
    system.mounts(DISK, "30 20 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu")
    system.write("proc/self/cgroup", "4:memory:/\n")
    system.version_1("", limit=3 * GIB)
    assert system.limits().host_total_bytes == 24 * GIB


# Version 2


@pytest.mark.parametrize("file", ["memory.max", "memory.high"])
def test_version_2_limits(system, file):
    system.mounts(DISK, UNIFIED)
    system.write("proc/self/cgroup", "0::/user/job\n")
    system.version_2("user")
    system.version_2("user/job", **{"most" if file == "memory.max" else "high": 5 * GIB}, current=3 * GIB, file=1 * GIB)
    limits = system.limits()
    assert (limits.host_total_bytes, limits.host_total_source) == (5 * GIB, f"control group /sys/fs/cgroup/user/job ({file})")
    assert limits.host_bytes == int(0.8 * (3 * GIB + 500 * MIB))


def test_version_2_all_ancestors_bind(system):
    system.mounts(DISK, UNIFIED)
    system.write("proc/self/cgroup", "0::/a/b/c\n")
    system.version_2("a", most=6 * GIB, current=5 * GIB)
    system.version_2("a/b", most=4 * GIB)
    system.version_2("a/b/c")
    limits = system.limits()
    assert limits.host_total_bytes == 4 * GIB
    # The hard limit is b's, but a has less left.
    assert limits.host_bytes == int(0.8 * (1 * GIB + 500 * MIB))
    assert limits.host_source.endswith("(control group /sys/fs/cgroup/a (memory.max))")


def test_both_versions_at_once(system):
    system.mounts(DISK, MEMORY_V1, "31 20 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")
    system.write("proc/self/cgroup", "4:memory:/box\n0::/box\n")
    system.version_1("box", limit=7 * GIB)
    system.version_2("unified/box", most=6 * GIB)
    assert system.limits().host_total_bytes == 6 * GIB


def test_a_group_outside_of_the_namespace_falls_back_to_the_mount(system):
    system.mounts(DISK, UNIFIED)
    system.write("proc/self/cgroup", "0::/../../other\n")
    system.version_2("", most=9 * GIB)
    assert system.limits().host_total_bytes == 9 * GIB


def test_mount_points_with_blanks(system):
    system.mounts(DISK, "31 20 0:31 / /sys/fs/cgroup/my\\040groups rw shared:1 master:2 - cgroup2 cgroup2 rw")
    system.write("proc/self/cgroup", "0::/box\n")
    system.version_2("my groups/box", most=9 * GIB)
    assert system.limits().host_total_bytes == 9 * GIB


# Resource limits


def test_resource_limits_count_what_is_mapped(system):
    limits = system.limits(rlimits={"RLIMIT_AS": 8 * GIB, "RLIMIT_DATA": 7 * GIB})
    # 3 GiB are mapped, 600 MiB of them resident: the rest is lost to us.
    assert limits.host_total_bytes == 8 * GIB - (3 * GIB - 600 * MIB)
    assert limits.host_total_source == "RLIMIT_AS of 8.0 GiB"
    assert system.limits(rlimits={"RLIMIT_DATA": 2 * GIB}).host_total_bytes == 2 * GIB - (1 * GIB - 600 * MIB)


# Budgets that are asked for


def test_an_explicit_budget_may_reach_the_limit_but_not_exceed_it(system):
    system.mounts(DISK, UNIFIED)
    system.write("proc/self/cgroup", "0::/box\n")
    system.version_2("box", most=4 * GIB)
    limits = system.limits(host_mem="4GiB")
    assert (limits.host_bytes, limits.host_source) == (4 * GIB, "host_mem='4GiB'")
    with pytest.raises(
        CapacityError, match=r"host_mem='5GiB' \(5.0 GiB\) is more than control group .*box \(memory.max\) allows \(4.0 GiB\)"
    ):
        system.limits(host_mem="5GiB")


def test_percentages_are_of_the_total(system):
    assert system.limits(host_mem="50%").host_bytes == 12 * GIB
    assert system.limits(disk="25%").disk_bytes == 50 * GIB
    assert system.limits(device="cuda", device_mem="50%", cuda=(30 * GIB, 40 * GIB)).device_bytes == 20 * GIB


def test_device_budgets(system):
    assert system.limits(device="auto").device == "cpu"
    auto = system.limits(device="auto", cuda=(30 * GIB, 40 * GIB))
    assert (auto.device, auto.device_bytes, auto.device_total_bytes) == ("cuda", 27 * GIB, 40 * GIB)
    assert system.limits(device="cuda", device_mem="35GiB", cuda=(30 * GIB, 40 * GIB)).device_bytes == 35 * GIB
    with pytest.raises(CapacityError, match="more than the device has"):
        system.limits(device="cuda", device_mem="41GiB", cuda=(30 * GIB, 40 * GIB))
    with pytest.raises(OptionError, match="device='cuda': this torch sees no CUDA device; use device='cpu'"):
        system.limits(device="cuda")
    with pytest.raises(OptionError, match=r"device_mem='1GiB': on a CPU device there is no device tier; use host_mem"):
        system.limits(device_mem="1GiB")


def test_a_device_budget_is_that_of_the_whole_process(system):
    """What this process has taken counts as free, and what CUDA itself takes belongs to the budget."""
    card = (30 * GIB, 40 * GIB, 2 * GIB, 500 * MIB)
    auto, asked = system.limits(device="cuda", cuda=card), system.limits(device="cuda", device_mem="16GiB", cuda=card)
    assert (auto.device_bytes, auto.device_overhead_bytes) == (int(0.9 * 32 * GIB), 500 * MIB)
    assert (asked.device_bytes, asked.device_overhead_bytes, asked.device_total_bytes) == (16 * GIB, 500 * MIB, 40 * GIB)
    assert system.limits(device="sim").device_overhead_bytes == system.limits(device="cpu").device_overhead_bytes == 0


def test_a_device_budget_without_room_beside_cuda(system):
    card = (30 * GIB, 40 * GIB, 500 * MIB, 500 * MIB)
    with pytest.raises(CapacityError) as caught:
        system.limits(device="cuda", device_mem="400MiB", cuda=card)
    assert str(caught.value) == (
        "device_mem='400MiB' (400.0 MiB) has no room for a model: CUDA's context and libraries alone take 500.0 MiB: raise device_mem"
    )
    with pytest.raises(CapacityError, match=r"the device's free memory .* has no room for a model: .* free some memory of the device"):
        system.limits(device="cuda", cuda=(20 * MIB, 40 * GIB, 500 * MIB, 500 * MIB))


def test_a_placement_on_a_device_that_is_not_there(system):
    assert system.limits(device="auto", weights="device=1", cuda=(30 * GIB, 40 * GIB)).device == "cuda"
    with pytest.raises(OptionError, match="weights='device=1': on a CPU device there is no device tier"):
        system.limits(device="auto", weights="device=1")


def test_the_simulated_device_is_host_memory(system):
    limits = system.limits(device="sim")
    assert limits.device_bytes == limits.device_total_bytes == 1 * GIB
    assert limits.host_bytes == int(0.8 * (19 * GIB + 500 * MIB))
    assert system.limits(device="sim", device_mem="3GiB", host_mem="21GiB").device_bytes == 3 * GIB
    with pytest.raises(CapacityError, match="are the same memory"):
        system.limits(device="sim", device_mem="4GiB", host_mem="21GiB")


# The offload folder


def test_the_disk_budget(system, tmp_path):
    limits = system.limits(offload_dir=str(tmp_path))
    assert (limits.disk_bytes, limits.disk_total_bytes, limits.offload_in_memory) == (80 * GIB, 200 * GIB, False)
    assert limits.offload_dir == str(tmp_path)
    assert system.limits(disk="90GiB").disk_bytes == 90 * GIB
    with pytest.raises(CapacityError, match=r"disk='101GiB' .* is more than is free in .* \(100.0 GiB\)"):
        system.limits(disk="101GiB")


def test_a_folder_that_does_not_exist_yet_is_judged_by_its_parent(system, tmp_path):
    asked = []
    find_limits(
        EngineOptions(device="cpu", offload_dir=str(tmp_path / "a" / "b")),
        root=system.root,
        rlimits={},
        disk_space=lambda folder: asked.append(folder) or (GIB, GIB),
    )
    assert asked == [tmp_path]


def test_an_offload_folder_that_is_a_file(system, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is not a folder"):
        system.limits(offload_dir=str(tmp_path / "file"))


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_memory_file_systems_are_flagged(system, tmp_path, kind):
    place = tmp_path / "place"
    place.mkdir()
    system.mounts(DISK, f"40 1 0:40 / {tmp_path} rw - {kind} {kind} rw", f"41 1 0:41 / {place}more rw - ext4 /dev/x rw")
    limits = system.limits(offload_dir=str(place))
    assert limits.offload_in_memory
    assert limits.disk_bytes == 0  # nothing unless asked for
    assert system.limits(offload_dir=str(place), disk="1GiB").disk_bytes == GIB
    # The last of the longest mount points above the folder counts.
    system.mounts(DISK, f"40 1 0:40 / {tmp_path} rw - {kind} {kind} rw", f"41 1 0:41 / {tmp_path} rw - xfs /dev/x rw")
    assert not system.limits(offload_dir=str(place)).offload_in_memory


def test_this_machine():
    limits = find_limits(EngineOptions(device="cpu"))
    assert 0 < limits.host_bytes <= limits.host_total_bytes
    assert limits.disk_total_bytes > 0
