"""Two processes for two cores: the files of tests are shared out between pytest and a copy of it.

conftest.py takes the hook from here. With a single file, --pdb, a GPU (which no copy may use) or
without fork, pytest runs as ever. Both take the next file from one queue, the largest first. The
copy writes its reports into a file, from which pytest tells them between its own tests.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import tempfile
import time

import pytest
import torch


def pytest_runtestloop(session):
    option = session.config.option
    files = [list(items) for _, items in itertools.groupby(session.items, lambda item: item.path)]
    if (len(files) < 2 or not hasattr(os, "fork") or os.cpu_count() < 2 or option.usepdb
            or option.collectonly or session.testsfailed or torch.cuda.is_available()):
        return None  # pytest's own loop
    files.sort(key=lambda items: -items[0].path.stat().st_size)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    for number in [*range(len(files)), None, None]:  # None: nothing is left, once for each
        queue.put(number)
    with tempfile.TemporaryDirectory() as folder:
        reports = os.path.join(folder, "reports")
        with open(reports, "w+", encoding="utf-8") as file:
            copy = context.Process(target=be_the_copy, args=(session, files, queue, folder))
            copy.start()
            try:
                for _ in run(session, files, queue):
                    tell(session, file)
                while copy.is_alive():
                    tell(session, file)
                    time.sleep(.1)
                tell(session, file)
            finally:
                copy.terminate()
                copy.join()
        if copy.exitcode:
            session.shouldfail = f"the copy ended with exit code {copy.exitcode}"
            raise session.Failed(session.shouldfail)
    return True


def run(session, files, queue):
    """Run the tests of file after file; yields after each test."""
    items = itertools.chain.from_iterable(files[number] for number in iter(queue.get, None))
    item = next(items, None)
    while item:
        coming = next(items, None)  # what both need is kept
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=coming)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        yield
        item = coming


def be_the_copy(session, files, queue, folder):
    """Run tests, with output, temporary files and reports of one's own."""
    config = session.config
    os.environ["PYTEST_DEBUG_TEMPROOT"] = folder
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    capture.start_global_capturing()
    config.pluginmanager.unregister(name="terminalreporter")
    with open(os.path.join(folder, "reports"), "a", encoding="utf-8") as file:
        class Writer:
            @staticmethod
            @pytest.hookimpl
            def pytest_runtest_logreport(report):
                data = config.hook.pytest_report_to_serializable(config=config, report=report)
                file.write(pickle.dumps(data).hex() + "\n")
                file.flush()
        config.pluginmanager.register(Writer)
        with contextlib.suppress(KeyboardInterrupt, session.Failed, session.Interrupted):
            for _ in run(session, files, queue):
                pass


def tell(session, file):
    """Tell what the copy has reported since."""
    while True:
        start, line = file.tell(), file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            break
        hook, config = session.config.hook, session.config
        data = pickle.loads(bytes.fromhex(line))
        report = hook.pytest_report_from_serializable(config=config, data=data)
        hook.pytest_runtest_logreport(report=report)
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
