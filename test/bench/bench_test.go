package main

import (
	"context"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	s := sample{5, 1, 4, 2, 3}
	for q, want := range map[float64]time.Duration{0: 1, .5: 3, .99: 5, 1: 5} {
		if got := s.quantile(q); got != want {
			t.Errorf("%v: %v, want %v", q, got, want)
		}
	}
	if s[0] != 5 {
		t.Error("the sample was sorted in its place")
	}
}

// TestTurns measures the sides in blocks, and does not count the first of each.
func TestTurns(t *testing.T) {
	var order strings.Builder
	side := func(name string) func() (time.Duration, error) {
		n := 0
		return func() (time.Duration, error) {
			order.WriteString(name)
			n++
			return time.Duration(n), nil
		}
	}
	samples, err := turns(t.Context(), 15, side("a"), side("b"))
	if err != nil || len(samples[0]) != 15 || len(samples[1]) != 15 || samples[0][0] != 2 {
		t.Errorf("%v, %v", samples, err)
	}
	want := strings.Repeat("a", 11) + strings.Repeat("b", 11) + strings.Repeat("a", 6) + strings.Repeat("b", 6)
	if order.String() != want {
		t.Errorf("%s", order.String())
	}
	broken := errors.New("broken")
	if _, err := turns(t.Context(), 1, func() (time.Duration, error) { return 0, broken }); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(broken)
	if _, err := turns(ctx, 1, side("a")); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}

func TestCrowd(t *testing.T) {
	cmd := exec.Command("sh", "-c", crowd(5))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }()
	if _, err := io.ReadFull(out, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	text, err := exec.Command("pgrep", "-g", strconv.Itoa(cmd.Process.Pid)).Output()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(strings.Fields(string(text))); n != 5 {
		t.Errorf("%d processes", n)
	}
}

// TestPlot draws what was measured and kept as files that a browser can read.
func TestPlot(t *testing.T) {
	dir := t.TempDir()
	r := &results{}
	r.compare("ours <&>", sample{2 * time.Millisecond}, "theirs", sample{4 * time.Millisecond}, "≤ 1")
	r.rates("rate", "/s", 30, "other", 10, "≥ 3")
	for i, at := range []float64{1, 10, 100} {
		r.point("a curve", "things", "ms", at, float64(i+1))
		r.point("a curve", "things", "MiB", at, float64(10*i))
	}
	r.point("one point", "things", "ms", 5, 1)
	file := filepath.Join(dir, "results.json")
	if err := r.write(file); err != nil {
		t.Fatal(err)
	}
	if err := plot([]string{file, dir}); err != nil {
		t.Fatal(err)
	}
	for name, wants := range map[string][]string{
		"ratios.svg":    {"ours &lt;&amp;&gt;", "0.50", "3.00", "≥ 3"},
		"a-curve.svg":   {"things", "ms", "MiB", "polyline"},
		"one-point.svg": {"circle"},
	} {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, want := range wants {
			if !strings.Contains(string(text), want) {
				t.Errorf("%s lacks %q", name, want)
			}
		}
		if strings.Contains(string(text), "NaN") || strings.Contains(string(text), "Inf") {
			t.Errorf("%s has a place that is none", name)
		}
		d := xml.NewDecoder(strings.NewReader(string(text)))
		for {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	if err := plot(nil); err == nil {
		t.Error("nothing to plot is no error")
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := plot([]string{file, dir}); err == nil {
		t.Error("half a file is no error")
	}
}
