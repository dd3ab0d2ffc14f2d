package diskspace_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/diskspace"
	"github.com/harvest-run/executord/internal/fault"
)

func TestFloor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked int
		left, failure := int64(100), error(nil)
		f := diskspace.New(diskspace.Config{Dir: "somewhere", MinFree: 100, Free: func(dir string) (int64, error) {
			asked++
			if dir != "somewhere" {
				t.Errorf("asked for %q", dir)
			}
			return left, failure
		}})
		if err := f.Check(); err != nil {
			t.Error(err)
		}
		left = 99
		if err := f.Check(); err != nil || asked != 1 {
			t.Errorf("%v after %d questions: an answer is good for a second", err, asked)
		}
		time.Sleep(time.Second)
		for range 1000 {
			err := f.Check()
			failed, ok := errors.AsType[*fault.Error](err)
			if !ok || failed.Kind != fault.Exhausted || failed.Reason != "DISK_FULL" || failed.RetryAfter <= 0 {
				t.Fatal(err)
			}
		}
		if asked != 2 {
			t.Errorf("asked %d times", asked)
		}
		// By itself, when there is room again.
		time.Sleep(time.Second)
		left = 1 << 40
		if err := f.Check(); err != nil {
			t.Error(err)
		}
		// What cannot be known keeps nobody from trying.
		time.Sleep(time.Second)
		left, failure = 0, errors.New("no such file system")
		if err := f.Check(); err != nil {
			t.Error(err)
		}
	})
}

func TestNoFloor(t *testing.T) {
	var none *diskspace.Floor
	if err := errors.Join(none.Check(), diskspace.New(diskspace.Config{Dir: "/nowhere/at/all"}).Check()); err != nil {
		t.Error(err)
	}
}

func TestKernel(t *testing.T) {
	free, err := diskspace.New(diskspace.Config{Dir: t.TempDir()}).Free()
	if err != nil || free <= 0 {
		t.Errorf("%d bytes free, %v", free, err)
	}
	if _, err := diskspace.New(diskspace.Config{Dir: "/nowhere/at/all"}).Free(); err == nil {
		t.Error("a directory that is not there has room")
	}
	if err := diskspace.New(diskspace.Config{Dir: t.TempDir(), MinFree: 1 << 60}).Check(); fault.ReasonOf(err) != "DISK_FULL" {
		t.Error(err)
	}
}
