"""What killed.py has other Python processes do: a conversion that counts its operations on files."""

# Counts the operations on files below a directory and, before one of them, sends the process the signals it was told.
HOOK = """
import json, os, runpy, signal, sys, threading, time
KINDS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")

def watch(place, at, signals):
    counted, lock = 0, threading.Lock()

    def hook(event, arguments):
        nonlocal counted
        if event not in KINDS or not arguments or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = os.fsdecode(arguments[0])
        if not path.startswith(place):
            return
        with lock:
            counted += 1
            if counted != at:
                return
        os.write(2, f"\\nbefore operation {at}: {event} {path[len(place):]}\\n".encode())
        for name in signals.split(","):
            os.kill(os.getpid(), signal.Signals["SIG" + name])
            # For it to arrive by itself, and before the operation.
            time.sleep(0.1)

    sys.addaudithook(hook)
    return lambda: os.write(2, f"\\n{counted} operations\\n".encode())
"""
# One process as a user starts it.
FRESH = (
    HOOK
    + """
order = json.loads(sys.argv[1])
tell = watch(order["place"], order["at"], order["signals"])
sys.argv = ["launch", *order["words"]]
try:
    runpy.run_module("radlads_jax.launch", run_name="__main__", alter_sys=True)
finally:
    tell()
"""
)
# A process that has imported all and done nothing; every order is carried out by a fork of it.
FORKING = (
    HOOK
    + """
from radlads_jax import launch
import radlads_jax.run.job, radlads_jax.run.train, radlads_jax.system.workdir

for line in sys.stdin:
    order, child = json.loads(line), os.fork()
    if child == 0:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        tell = watch(order["place"], order["at"], order["signals"])
        sys.argv = ["launch", *order["words"]]
        try:
            launch.command_line()
        finally:
            tell()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)
