package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"
)

// results are what was measured: printed row by row as it comes, kept for plots.
type results struct {
	// Ratios are ours ÷ theirs, of medians.
	Ratios []ratio `json:"ratios"`
	Points []point `json:"points"`
}

// ratio is one comparison.
type ratio struct {
	Name   string  `json:"name"`
	Ratio  float64 `json:"ratio"`
	Target string  `json:"target,omitempty"`
}

// point is one of a curve: a plot has a curve for each Y.
type point struct {
	Plot string  `json:"plot"`
	X    string  `json:"x"`
	Y    string  `json:"y"`
	At   float64 `json:"at"`
	Is   float64 `json:"is"`
}

func (r *results) head() {
	fmt.Println("| measurement | executord p50 | p99 | beside it | p50 | p99 | ratio of p50 | target |")
	fmt.Println("|---|---|---|---|---|---|---|---|")
}

// compare takes down two samples of times.
func (r *results) compare(name string, ours sample, other string, theirs sample, target string) {
	by := float64(ours.quantile(.5)) / float64(theirs.quantile(.5))
	fmt.Printf("| %s | %s | %s | %s | %s | %s | %.2f | %s |\n", name, ms(ours.quantile(.5)), ms(ours.quantile(.99)),
		other, ms(theirs.quantile(.5)), ms(theirs.quantile(.99)), by, target)
	r.Ratios = append(r.Ratios, ratio{name + " ÷ " + other, by, target})
}

// rates takes down two rates, of which the higher is the better.
func (r *results) rates(name, unit string, ours float64, other string, theirs float64, target string) {
	fmt.Printf("| %s | %.0f %s | | %s | %.0f %s | | %.2f | %s |\n", name, ours, unit, other, theirs, unit, ours/theirs, target)
	r.Ratios = append(r.Ratios, ratio{name + " ÷ " + other, ours / theirs, target})
}

// number takes down a figure that stands alone; by is its ratio to the first of its
// kind, 0 if it has none.
func (r *results) number(name, unit string, is, by float64, target string) {
	relation := ""
	if by != 0 {
		relation = fmt.Sprintf("%.2f of the first", by)
	}
	fmt.Printf("| %s | %.2f %s | | | | | %s | %s |\n", name, is, unit, relation, target)
}

// point takes down a point of a curve.
func (r *results) point(plot, x, y string, at, is float64) {
	r.Points = append(r.Points, point{plot, x, y, at, is})
}

// write keeps the results in a file, for the plots.
func (r *results) write(file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// sample is one side of a comparison.
type sample []time.Duration

func (s sample) quantile(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(s))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", float64(d.Microseconds())/1000) }
