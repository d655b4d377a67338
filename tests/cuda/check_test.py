"""What the compiler reports of a kernel is read right, and what exceeds a limit is found."""

import contextlib
import importlib.util
import io
import tempfile
import unittest
import zipfile
from dataclasses import replace
from pathlib import Path

import check
import nvrtc

# Reports of ptxas from CUDA 13.0, as they came.
TWO_KERNELS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'norm_bf16' for 'sm_80'
ptxas info    : Function properties for norm_bf16
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 36 registers, used 1 barriers, 128 bytes smem, 424 bytes cmem[0]
ptxas info    : Compile time = 40.504 ms
ptxas info    : Compiling entry function 'trig' for 'sm_80'
ptxas info    : Function properties for trig
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 22 registers, used 0 barriers, 360 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 5.983 ms
"""
SPILL = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'spilling' for 'sm_90'
ptxas info    : Function properties for spilling
ptxas         .     304 bytes stack frame, 436 bytes spill stores, 524 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 304 bytes cumulative stack size
ptxas info    : Compile time = 84.644 ms
"""
FRAME = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'calling' for 'sm_90'
ptxas info    : Function properties for calling
ptxas         .     160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 29 registers, used 1 barriers, 160 bytes cumulative stack size
ptxas info    : Compile time = 7.245 ms
ptxas info    : Function properties for _Z6helperPfi
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
MANY_REGISTERS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'wide' for 'sm_90'
ptxas info    : Function properties for wide
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compile time = 111.372 ms
"""
MUCH_SHARED = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'sharing' for 'sm_90'
ptxas info    : Function properties for sharing
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 80000 bytes smem
ptxas info    : Compile time = 4.554 ms
"""
WARNING = """\
part.cu(8): warning #177-D: variable "unused" was declared but never referenced
    int unused;
        ^
"""
PTX = """\
.version 9.0
.target sm_90
.address_size 64

.func  (.param .b32 func_retval0) _Z6helperPfi(
	.param .b64 _Z6helperPfi_param_0
)
{
	ret;
}
.visible .entry free(
	.param .u64 .ptr .align 1 free_param_0,
	.param .align 8 .b8 free_param_1[40]
)
{
	ret;
}
.visible .entry without_parameters()
.maxntid 96, 2, 1
{
	ret;
}
.visible .entry bounded(
	.param .u64 .ptr .align 1 bounded_param_0
)
.maxntid 384, 1, 1
.minnctapersm 2
{
	ret;
}
.weak .entry _Z6mangledIfEvPT_(
	.param .u64 .ptr .align 1 _Z6mangledIfEvPT__param_0
)
.reqntid 64
{
	ret;
}
"""

KERNEL = check.Kernel(
    name="kernel",
    architecture="sm_90",
    largest_block=1024,
    registers=32,
    shared=0,
    stack=0,
    spill_stores=0,
    spill_loads=0,
    barriers=0,
)
PART = check.Compiled("part.cu", "sm_90", "", "", {"kernel": 1024}, (KERNEL,))
STRICT = check.Limits({})


def faults(report: str, block: int = 1024, limits: check.Limits = STRICT) -> list[str]:
    """What is wrong with the only kernel of a report."""
    (kernel,) = check.read_report(report, {})
    return limits.faults(replace(kernel, largest_block=block))


class Reports(unittest.TestCase):
    def test_each_kernel_has_its_own_figures(self) -> None:
        norm, trig = check.read_report(TWO_KERNELS, {"norm_bf16": 256})
        expected = replace(
            KERNEL,
            name="norm_bf16",
            architecture="sm_80",
            largest_block=256,
            registers=36,
            shared=128,
            barriers=1,
        )
        self.assertEqual(norm, expected)
        self.assertEqual((trig.name, trig.registers, trig.shared), ("trig", 22, 0))
        self.assertEqual(trig.largest_block, 1024)

    def test_spills_and_frames_are_read(self) -> None:
        (kernel,) = check.read_report(SPILL, {})
        self.assertEqual((kernel.spill_stores, kernel.spill_loads, kernel.stack), (436, 524, 304))
        self.assertEqual((kernel.registers, kernel.barriers), (64, 1))

    def test_what_a_called_function_spills_counts_for_the_kernel(self) -> None:
        (kernel,) = check.read_report(FRAME, {})
        self.assertEqual((kernel.stack, kernel.spills), (160, 0))
        tail = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        self.assertTrue(FRAME.endswith(tail))
        report = FRAME[: -len(tail)]
        report += "40 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        report = report.replace("160 bytes cumulative", "200 bytes cumulative")
        report = report.replace("frame, 0 bytes spill stores", "frame, 4 bytes spill stores")
        (kernel,) = check.read_report(report, {})
        self.assertEqual((kernel.stack, kernel.spill_stores, kernel.spill_loads), (200, 12, 16))

    def test_a_log_without_kernels_has_none(self) -> None:
        self.assertEqual(check.read_report("ptxas info    : 4 bytes gmem\n" + WARNING, {}), [])

    def test_launch_bounds_come_from_the_ptx(self) -> None:
        expected = {
            "free": 1024,
            "without_parameters": 192,
            "bounded": 384,
            "_Z6mangledIfEvPT_": 64,
        }
        self.assertEqual(check.read_blocks(PTX), expected)
        self.assertEqual(check.read_blocks(""), {})


class OfAMultiprocessor(unittest.TestCase):
    def test_occupancy_is_that_of_registers_and_shared_memory(self) -> None:
        for architecture, registers, shared, expected in (
            ("sm_90", 32, 128, 1.0),
            ("sm_90", 33, 0, 0.75),
            ("sm_90", 40, 0, 0.75),
            ("sm_90", 128, 0, 0.25),
            ("sm_90", 168, 0, 0.125),
            ("sm_90", 255, 0, 0.125),
            ("sm_80", 32, 30 * 1024, 0.625),
            ("sm_90", 32, 30 * 1024, 0.875),
            ("sm_90", 32, 48 * 1024, 0.5),
        ):
            kernel = replace(KERNEL, architecture=architecture, registers=registers, shared=shared)
            with self.subTest(kernel=kernel):
                self.assertEqual(kernel.occupancy, expected)

    def test_occupancy_is_that_of_the_largest_block_where_that_is_small(self) -> None:
        self.assertEqual(replace(KERNEL, largest_block=32).occupancy, 0.5)
        self.assertEqual(replace(KERNEL, largest_block=96).occupancy, 63 / 64)

    def test_registers_go_to_whole_warps_of_one_part(self) -> None:
        # ptxas keeps to 168 registers at 384 threads, and to 128 at 416, where 152 would suffice
        # if all parts had one pool.
        for registers, block in ((64, 1024), (168, 384), (128, 416), (128, 512), (255, 256)):
            kernel = replace(KERNEL, registers=registers, largest_block=block)
            with self.subTest(registers=registers, block=block):
                self.assertEqual(STRICT.faults(kernel), [])
                if registers < 255:
                    more = replace(kernel, registers=registers + 1)
                    self.assertEqual(len(STRICT.faults(more)), 1)


class AgainstLimits(unittest.TestCase):
    def test_a_spill_is_found(self) -> None:
        frame, spill = faults(SPILL)
        self.assertEqual(frame, "spilling on sm_90: a stack frame of 304 bytes, 0 are allowed")
        self.assertIn("436 bytes of spill stores and 524 of loads", spill)

    def test_a_stack_frame_is_found(self) -> None:
        (fault,) = faults(FRAME)
        self.assertIn("calling on sm_90: a stack frame of 160 bytes", fault)

    def test_too_many_registers_for_the_largest_block_are_found(self) -> None:
        (fault,) = faults(MANY_REGISTERS)
        self.assertIn("128 registers are too many for its largest block, 1024 threads", fault)
        self.assertEqual(faults(MANY_REGISTERS, block=512), [])

    def test_too_much_shared_memory_is_found(self) -> None:
        (fault,) = faults(MUCH_SHARED)
        self.assertIn("80000 bytes of static shared memory, 49152 are allowed", fault)
        self.assertEqual(faults(MUCH_SHARED.replace("80000", "49152")), [])

    def test_a_kernel_may_be_named_with_other_limits(self) -> None:
        def limits(stack: int, spills: int) -> check.Limits:
            table = {"stack": stack, "spills": spills, "reason": "it must"}
            return check.Limits({"kernel": {"spilling": table}})

        self.assertEqual(faults(SPILL, limits=limits(304, 960)), [])
        self.assertEqual(len(faults(SPILL, limits=limits(303, 960))), 1)
        self.assertEqual(len(faults(SPILL, limits=limits(304, 959))), 1)
        # Nobody else has them, and what the table leaves out is the default.
        self.assertEqual(len(faults(FRAME, limits=limits(304, 960))), 1)
        only_stack = {"spilling": {"stack": 304, "reason": "it must"}}
        self.assertEqual(len(faults(SPILL, limits=check.Limits({"kernel": only_stack}))), 1)
        both = check.Limits({"default": {"stack": 160, "spills": 960}, "kernel": only_stack})
        self.assertEqual(faults(FRAME, limits=both), [])
        self.assertEqual(faults(SPILL, limits=both), [])

    def test_limits_that_mean_nothing_are_refused(self) -> None:
        contents: list[dict] = [
            {"defaults": {}},
            {"default": {"register": 1}},
            {"default": {"reason": "why"}},
            {"default": {"stack": -1}},
            {"default": {"stack": True}},
            {"kernel": {"a": {"stack": 8}}},
            {"kernel": {"a": {"stack": 8, "reason": " "}}},
            {"kernel": {"a": {"stacks": 8, "reason": "why"}}},
        ]
        for content in contents:
            with self.subTest(content=content), self.assertRaises(nvrtc.CannotCheck):
                check.Limits(content)

    @unittest.skipUnless(importlib.util.find_spec("tomllib"), "Python 3.11 or newer reads TOML")
    def test_the_recorded_limits_are_read(self) -> None:
        self.assertEqual(check.Limits.read().default, check.Limit(stack=0, spills=0))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "limits.toml"
            for text in ("[default", "[default]\nstack = 'much'\n"):
                path.write_text(text)
                with self.assertRaises(nvrtc.CannotCheck):
                    check.Limits.read(path)


class AsAWhole(unittest.TestCase):
    def test_what_is_within_its_limits_passes(self) -> None:
        self.assertEqual(check.judge([PART], STRICT, whole=True), [])

    def test_what_is_wrong_with_a_file_is_found(self) -> None:
        mangled = replace(PART, blocks={"_Z1fv": 1024}, kernels=[replace(KERNEL, name="_Z1fv")])
        for part, words in (
            (replace(PART, error="NVRTC_ERROR_COMPILATION"), "does not compile"),
            (replace(PART, words=WARNING.strip()), "has warnings"),
            (replace(PART, words="ptxas warning : Local memory used"), "has warnings"),
            (replace(PART, kernels=()), "no report of kernel"),
            (replace(PART, blocks={}, kernels=()), "exports no kernel"),
            (mangled, "exports no kernel"),
        ):
            with self.subTest(words=words):
                (fault,) = check.judge([part], STRICT, whole=True)
                self.assertIn(words, fault)
                self.assertTrue(fault.startswith("part.cu for sm_90"))

    def test_a_kernel_beyond_its_limits_is_found(self) -> None:
        part = replace(PART, kernels=[replace(KERNEL, stack=8)])
        (fault,) = check.judge([PART, part], STRICT, whole=True)
        self.assertIn("a stack frame of 8 bytes", fault)

    def test_a_name_in_two_files_is_found(self) -> None:
        other = replace(PART, name="other.cu")
        (fault,) = check.judge([PART, other], STRICT, whole=True)
        self.assertEqual(fault, "kernel is in other.cu and in part.cu")

    def test_a_limit_of_a_kernel_that_is_gone_is_found(self) -> None:
        limits = check.Limits({"kernel": {"gone": {"stack": 8, "reason": "it must"}}})
        (fault,) = check.judge([PART], limits, whole=True)
        self.assertIn("names gone, which no longer exists", fault)
        self.assertEqual(check.judge([PART], limits, whole=False), [])
        broken = replace(PART, error="NVRTC_ERROR_COMPILATION")
        self.assertEqual(len(check.judge([broken], limits, whole=True)), 1)

    def test_the_table_has_a_row_for_each_kernel(self) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            check.print_kernels([KERNEL, replace(KERNEL, name="other", registers=64)])
        rows = [line.replace(" ", "") for line in said.getvalue().split("\n") if line]
        self.assertEqual(rows[2], "|kernel|1024|-|-|-|-|32|0|0|100%|")
        self.assertEqual(rows[3], "|other|1024|-|-|-|-|64|0|0|50%|")


class Installing(unittest.TestCase):
    def test_only_the_two_libraries_are_taken(self) -> None:
        wanted = ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0")
        others = ("libnvrtc.alt.so.13", "libnvrtc-builtins.alt.so.13.0", "__init__.py")
        with tempfile.TemporaryDirectory() as name:
            wheel, folder = Path(name) / "a.whl", Path(name) / "lib"
            folder.mkdir()
            with zipfile.ZipFile(wheel, "w") as archive:
                for member in (*wanted, *others):
                    archive.writestr(f"nvidia/cu13/lib/{member}", member)
            nvrtc.extract(wheel, folder)
            found = {path.name: path.read_text() for path in folder.iterdir()}
            self.assertEqual(found, {member: member for member in wanted})

    def test_a_wheel_without_them_is_refused(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            wheel, folder = Path(name) / "a.whl", Path(name) / "lib"
            folder.mkdir()
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr("nvidia/cu13/lib/libnvrtc.so.13", "")
            with self.assertRaises(nvrtc.CannotCheck):
                nvrtc.extract(wheel, folder)


if __name__ == "__main__":
    unittest.main()
