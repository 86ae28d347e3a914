"""BackupAndRestore: a training that dies anywhere goes on bit for bit."""

import errno
import inspect
import json
import os
import resource
import subprocess
import sys

import keras
import killed
import pytest
import tensorflow as tf
from backed_up import BATCHES, KINDS, Logs, Moments, check_same, data, fit, make, state, validation
from crosses import cross
from deaths import Clock, Death

import accumops
from accumops import AccumStepsScheduler, BackupAndRestore, EffectiveBatchSize, GradientAccumulateModel


def interrupt(model, directory, moment, *callbacks, save_freq=2, **arguments):
    """Trains until a moment: 1 is the training's begin, 2 the epoch's, 3 and 4 the first batch's begin and end, …"""
    with pytest.raises(Death):
        fit(model, BackupAndRestore(directory, save_freq), *callbacks, Moments(Clock(moment)), **arguments)


def end_of_batch(epoch, batch):
    """The moment for `interrupt`, both counted from 0. The backup at this batch, if any, is not made any more."""
    return 1 + epoch * (2 * BATCHES + 2) + 1 + 2 * (batch + 1)


class TestDeaths:
    @pytest.mark.parametrize(
        ("kind", "save_freq", "run"),
        cross(
            KINDS,
            ["epoch", 1, 2, 7],
            ["eager", "graph", "xla"],
            default=lambda kind, save_freq, run: run == "eager" and (kind, save_freq) == ("scheduled", 2),
        ),
    )
    def test_dies_and_goes_on(self, tmp_path, monkeypatch, rng, kind, save_freq, run):
        """Weights, optimizer, window, seeds and all logs are those of an undisturbed training."""
        options = {"run_eagerly": run == "eager", "jit_compile": run == "xla"}
        extra = [] if kind == "plain" else [EffectiveBatchSize()]
        undisturbed, wanted_logs, logs = make(kind, **options), {}, {}
        with Clock().rules_files(monkeypatch) as clock:
            backup = BackupAndRestore(tmp_path / "a", save_freq)
            fit(undisturbed, backup, *extra, Logs(wanted_logs), Moments(clock), **validation())
        deaths = [*rng.integers(1, clock.moments * 2 // 3, 2), None]
        for i, moment in enumerate(deaths):
            model = make(kind, **options)
            try:
                with Clock(moment).rules_files(monkeypatch) as clock:
                    backup = BackupAndRestore(tmp_path / "b", save_freq, double_checkpoint=bool(i % 2))
                    fit(model, backup, *extra, Logs(logs), Moments(clock), **validation())
                break
            except Death:
                assert moment is not None
        check_same(state(model), state(undisturbed))
        assert logs == wanted_logs
        assert os.listdir(tmp_path) == []

    @pytest.mark.exhaustive
    def test_killed_200_times(self, tmp_path):
        """By SIGKILL, at random moments of `fit`."""
        command = [sys.executable, killed.__file__, str(tmp_path), "200"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr[-5_000:])
        assert done.returncode == 0
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["kills"] == 200
        assert report["kills within a backup"] > 20
        assert report["trainings"] == report["trainings with the bits of an undisturbed one"] > 5


class TestPassedBatches:
    """What a backup from the middle of an epoch needs."""

    @pytest.mark.exhaustive
    def test_callbacks_see_the_logs_of_the_backup(self, tmp_path):
        seen = []

        class See(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                seen.append((batch, logs["loss"]))

        interrupt(make("eager"), tmp_path, end_of_batch(1, 4), See())
        first, seen = seen[BATCHES:], []
        fit(make("eager"), BackupAndRestore(tmp_path, 2), See())
        # Backups are after 2, 4, 6 and 8 batches, the last after 3 of the second epoch.
        assert seen[:3] == [(batch, first[2][1]) for batch in range(3)]
        assert seen[3] == first[3]

    @pytest.mark.exhaustive
    def test_several_steps_an_execution(self, tmp_path):
        options = {"steps_per_execution": 2, "run_eagerly": True}
        wanted, got = make("plain", **options), make("plain", **options)
        fit(wanted, BackupAndRestore(tmp_path / "a"))
        backup = BackupAndRestore(tmp_path / "b", save_freq=4)
        with pytest.raises(Death):
            fit(got, backup, Moments(Clock(7)))  # the begin of the third execution
        got = make("plain", **options)
        fit(got, BackupAndRestore(tmp_path / "b", save_freq=4))
        check_same(state(got), state(wanted))

    def test_other_steps_an_execution(self, tmp_path):
        interrupt(make("eager"), tmp_path, end_of_batch(0, 4), save_freq=3)
        model = make("plain", run_eagerly=True, steps_per_execution=2)
        with pytest.raises(ValueError, match="after 3 batches of the epoch, and `steps_per_execution=2` does not stop"):
            fit(model, BackupAndRestore(tmp_path, 3))

    def test_an_epoch_of_another_size(self, tmp_path):
        interrupt(make("eager"), tmp_path, end_of_batch(0, 4))
        with pytest.raises(ValueError, match=r"after 4 of 5 batches of an epoch. Now an epoch has 10 batches"):
            fit(make("eager"), BackupAndRestore(tmp_path, 2), batch_size=2)

    def test_data_that_ends_early(self, tmp_path):
        """The generator does not say how many batches it has."""
        x, y = data()

        def train(samples, *callbacks):
            model = make("eager")
            batches = tf.data.Dataset.from_generator(
                lambda: zip(x[:samples, None], y[:samples, None], strict=True),
                output_signature=(tf.TensorSpec([1, 3]), tf.TensorSpec([1, 1], tf.float64)),
            )
            model.fit(batches, callbacks=[*callbacks, BackupAndRestore(tmp_path, 6)], verbose=0)

        with pytest.raises(Death):
            train(8, Moments(Clock(2 + 2 * 7)))
        with pytest.raises(ValueError, match="after 6 batches of the epoch, and the data has ended after 4"):
            train(4)
        train(8)

    def test_another_fit_after_one_that_failed_among_them(self, tmp_path):
        """Trains on all batches."""
        model = make("eager")
        interrupt(model, tmp_path, end_of_batch(0, 4))
        for moment in (end_of_batch(0, 0) - 1, end_of_batch(0, 0)):
            interrupt(model, tmp_path, moment)
            before = int(model.optimizer.iterations)
            x, y = data()
            model.fit(x, y, batch_size=4, verbose=0)
            assert int(model.optimizer.iterations) == before + BATCHES

    def test_stale_updates_do_not_reach_callbacks(self, tmp_path):
        """At the epoch's begin the count of updates is that of its begin."""
        counts = []

        class Count(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                counts.append((epoch, int(self.model.optimizer.iterations)))

        interrupt(make("eager"), tmp_path, end_of_batch(1, 3))
        fit(make("eager"), BackupAndRestore(tmp_path, 2), Count())
        assert counts == [(1, 5)]


class TestWhatIsRestored:
    def test_seeds(self, tmp_path):
        """Of layers, and of functions without a seed."""

        class Noise(keras.layers.Layer):
            def call(self, x):
                return x + keras.random.normal(keras.ops.shape(x))

        def train(*callbacks, directory):
            keras.utils.set_random_seed(0)
            net = keras.Sequential([keras.Input((3,)), Noise(), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
            net.compile("sgd", loss="mse", run_eagerly=True)
            fit(net, BackupAndRestore(directory), *callbacks)
            return state(net)

        wanted = train(directory=tmp_path / "a")
        with pytest.raises(Death):
            train(Moments(Clock(end_of_batch(1, 1))), directory=tmp_path / "b")
        check_same(train(directory=tmp_path / "b"), wanted)

    def test_accum_steps_that_a_callback_has_set(self, tmp_path):
        """And a number that the new start is given holds."""

        def scheduled(accum_steps, epochs, *callbacks):
            net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
            model = GradientAccumulateModel(net, accum_steps=accum_steps, partial_window="carry")
            model.compile("sgd", loss="mse", run_eagerly=True)
            double = AccumStepsScheduler(lambda epoch, steps: 2 * steps if epoch == 1 else steps)
            fit(model, BackupAndRestore(tmp_path, delete_checkpoint=False), double, epochs=epochs)
            return model.accum_steps

        assert scheduled(2, 2) == 4
        assert scheduled(2, 2) == 4  # from the backup: there is no epoch left
        assert scheduled(3, 2) == 3

    def test_the_next_fit_starts_where_it_is_told(self, tmp_path):
        model = make("eager")
        interrupt(model, tmp_path, end_of_batch(1, 4), save_freq="epoch")
        assert fit(model, BackupAndRestore(tmp_path)).epoch == [1]
        assert fit(model, BackupAndRestore(tmp_path)).epoch == [0, 1]

    def test_a_training_that_has_ended(self, tmp_path):
        for epochs, wanted in ((1, [0]), (1, []), (2, [1])):
            backup = BackupAndRestore(tmp_path, delete_checkpoint=False)
            assert fit(make("eager"), backup, epochs=epochs).epoch == wanted

    @pytest.mark.exhaustive
    def test_the_initial_epoch_of_fit(self, tmp_path):
        """Backups in the first epoch name it."""
        interrupt(make("eager"), tmp_path, end_of_batch(0, 4), initial_epoch=1)
        history = fit(make("eager"), BackupAndRestore(tmp_path, 2), initial_epoch=1)
        assert history.epoch == [1]

    def test_other_ops_are_told(self, tmp_path, monkeypatch):
        """They have other roundings."""
        interrupt(make("optimizer", run_eagerly=True), tmp_path, end_of_batch(1, 0), save_freq="epoch")
        before = accumops.get_backend()
        loaded = accumops.build_info()["loaded"]
        monkeypatch.setattr(accumops.ops, "build_info", lambda: {"loaded": not loaded, "reason": "they are gone"})
        accumops.set_backend("auto")
        try:
            with pytest.warns(RuntimeWarning, match="The two differ by roundings"):
                fit(make("optimizer", run_eagerly=True), BackupAndRestore(tmp_path))
        finally:
            accumops.set_backend(before)


class TestDamage:
    def backed_up(self, directory, **arguments):
        """Trains two epochs, and returns the path of the newest backup."""
        backup = BackupAndRestore(directory, delete_checkpoint=False, **arguments)
        fit(make("eager"), backup)
        return sorted(directory.iterdir())[-1]

    def test_the_backup_before_is_used(self, tmp_path):
        path = self.backed_up(tmp_path, double_checkpoint=True)
        os.truncate(path / "state.npz", 100)
        model, epochs = make("eager"), []
        with pytest.warns(RuntimeWarning, match=rf"{path.name}: 'state.npz' .*goes on from backup-00000001"):
            epochs += fit(model, BackupAndRestore(tmp_path, double_checkpoint=True)).epoch
        assert epochs == [1]
        assert int(model.optimizer.iterations) == 2 * BATCHES

    def test_training_does_not_start_anew(self, tmp_path):
        path = self.backed_up(tmp_path)
        size = os.path.getsize(path / "model.weights.h5")
        os.truncate(path / "model.weights.h5", 1000)
        model = make("eager")
        before = state(model)
        with pytest.raises(OSError, match=f"'model.weights.h5' has 1000 bytes, and was written with {size}"):
            fit(model, BackupAndRestore(tmp_path))
        check_same(state(model), before)
        assert path.exists()

    def test_a_disk_without_room_is_found_before_anything_is_written(self, tmp_path, monkeypatch):
        path = self.backed_up(tmp_path)
        model = make("eager")
        monkeypatch.setattr(model, "save_weights", lambda path: pytest.fail("HDF5 would write"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = sum(each.stat().st_size for each in path.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match=f"No space left on device: .* bytes are needed, and {size} free"):
                fit(model, BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(tmp_path.iterdir()) == [path]

    @pytest.mark.exhaustive
    def test_a_full_disk_that_a_closed_file_finds(self, tmp_path, monkeypatch):
        """h5py keeps a file's end in memory until the file is closed. What fails then is a RuntimeError of its own."""
        path = self.backed_up(tmp_path)
        model = make("eager")

        def save_weights(path):
            raise RuntimeError("Can't close file (errno = 28, error message = 'No space left on device')")

        monkeypatch.setattr(model, "save_weights", save_weights)
        with pytest.raises(OSError, match="No space left on device") as raised:
            fit(model, BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=3)
        assert raised.value.errno == errno.ENOSPC
        assert sorted(tmp_path.iterdir()) == [path]

    def test_a_backup_of_another_model(self, tmp_path):
        self.backed_up(tmp_path)
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(7)])
        net.compile("adam", loss="mse")
        with pytest.raises(ValueError, match=r"The backup in .* is not of this model"):
            fit(net, BackupAndRestore(tmp_path))

    def test_a_model_with_other_seeds(self, tmp_path):
        net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        net.compile("adam", loss="mse", run_eagerly=True)
        fit(net, BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=1)
        net.add(keras.layers.Dropout(0.5))
        with pytest.raises(ValueError, match=r"random seeds have the shapes \[\(2,\)\]. Received: \[\]"):
            fit(net, BackupAndRestore(tmp_path))

    def test_a_backup_of_keras(self, tmp_path):
        fit(make("eager"), keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False), epochs=1)
        with pytest.raises(ValueError, match=r"has a backup of keras\.callbacks\.BackupAndRestore"):
            fit(make("eager"), BackupAndRestore(tmp_path))


class TestArguments:
    @pytest.mark.parametrize("save_freq", ["batch", 0, -1, 2.0, True, False, None])
    def test_save_freq(self, save_freq):
        with pytest.raises(ValueError, match=r"Invalid value for argument `save_freq`. Received: save_freq="):
            BackupAndRestore("backups", save_freq=save_freq)

    @pytest.mark.parametrize("backup_dir", ["", None])
    def test_no_directory(self, backup_dir):
        with pytest.raises(ValueError, match="Empty `backup_dir` argument passed"):
            BackupAndRestore(backup_dir)

    @pytest.mark.parametrize("backup_dir", ["gs://bucket/backups", "s3://bucket/backups"])
    def test_a_remote_directory(self, backup_dir):
        with pytest.raises(ValueError, match=f"must be a local path. Received: '{backup_dir}'"):
            BackupAndRestore(backup_dir)

    @pytest.mark.parametrize("name", ["double_checkpoint", "delete_checkpoint"])
    def test_no_bool(self, name):
        with pytest.raises(TypeError, match=f"`{name}` must be True or False. Received: 1"):
            BackupAndRestore("backups", **{name: 1})

    def test_those_of_keras(self):
        """So that it can take the place of Keras's callback."""
        ours, of_keras = (
            inspect.signature(kind.__init__) for kind in (BackupAndRestore, keras.callbacks.BackupAndRestore)
        )
        assert [(each.name, each.default) for each in ours.parameters.values()] == [
            (each.name, each.default) for each in of_keras.parameters.values()
        ]
        assert isinstance(BackupAndRestore("backups"), keras.callbacks.BackupAndRestore)

    def test_a_model_that_is_not_built(self, tmp_path):
        net = keras.Sequential([keras.layers.Dense(1)])
        net.compile("sgd", loss="mse")
        with pytest.raises(ValueError, match="your model must be built before you call"):
            fit(net, BackupAndRestore(tmp_path / "backups"))
        assert not (tmp_path / "backups").exists()

    def test_the_working_directory_is_no_matter(self, tmp_path, monkeypatch):
        """A relative path is where it was when training started."""
        monkeypatch.chdir(tmp_path)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        change = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: os.chdir(elsewhere))
        fit(make("eager"), BackupAndRestore("backups", delete_checkpoint=False), change, epochs=1)
        assert os.listdir(tmp_path / "backups") == ["backup-00000001"]
