package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// plot draws the results in a file as SVG into a directory: plot RESULTS.json DIR.
func plot(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: bench plot RESULTS.json DIRECTORY")
	}
	text, err := os.ReadFile(args[0])
	if err != nil {
		return err
	}
	var r results
	if err := json.Unmarshal(text, &r); err != nil {
		return fmt.Errorf("read %s: %w", args[0], err)
	}
	files := map[string]string{"ratios.svg": bars(r.Ratios)}
	for _, p := range r.Points {
		files[strings.ReplaceAll(p.Plot, " ", "-")+".svg"] = curves(p.Plot, r.Points)
	}
	for name, svg := range files {
		if err := os.WriteFile(filepath.Join(args[1], name), []byte(svg), 0o644); err != nil {
			return err
		}
	}
	return nil
}

const (
	width, margin = 860, 60
	lineHeight    = 30
	colours       = "#1f6feb #d1242f #1a7f37 #8250df"
)

func svg(height int, body string) string {
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">`+
		"\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n%s</svg>\n", width, height, body)
}

// bars draws a bar for each ratio; the line at 1 is where both sides are the same.
func bars(ratios []ratio) string {
	var b strings.Builder
	most := 1.0
	for _, r := range ratios {
		most = max(most, r.Ratio)
	}
	const left = 480
	scale := float64(width-left-margin) / most
	for i, r := range ratios {
		y := margin/2 + i*lineHeight
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%s</text>\n", left-8, y+15, html.EscapeString(r.Name))
		fmt.Fprintf(&b, "<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"18\" fill=\"#1f6feb\"/>\n", left, y, r.Ratio*scale)
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%d\">%.2f  %s</text>\n", left+r.Ratio*scale+6, y+14, r.Ratio, html.EscapeString(r.Target))
	}
	height := margin + len(ratios)*lineHeight
	fmt.Fprintf(&b, "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"10\" y2=\"%d\" stroke=\"#888\" stroke-dasharray=\"4\"/>\n", left+scale, left+scale, height-20)
	return svg(height, b.String())
}

// curves draws all curves of one plot over the logarithm of x, each on a scale of its
// own, whose ends stand beside it.
func curves(name string, all []point) string {
	var mine []point
	var names []string
	for _, p := range all {
		if p.Plot == name {
			mine = append(mine, p)
			if !slices.Contains(names, p.Y) {
				names = append(names, p.Y)
			}
		}
	}
	const height = 360
	least, most := math.Inf(1), 0.0
	for _, p := range mine {
		least, most = min(least, p.At), max(most, p.At)
	}
	across := func(x float64) float64 {
		if most == least {
			return width / 2
		}
		return margin + (width-2*margin)*math.Log(x/least)/math.Log(most/least)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", width/2, height-12, html.EscapeString(mine[0].X))
	for i, y := range names {
		colour := strings.Fields(colours)[i%4]
		top := 0.0
		for _, p := range mine {
			if p.Y == y {
				top = max(top, p.Is)
			}
		}
		var path []string
		for _, p := range mine {
			if p.Y != y {
				continue
			}
			at, up := across(p.At), float64(height-margin)-(height-2*margin)*p.Is/top
			path = append(path, fmt.Sprintf("%.1f,%.1f", at, up))
			fmt.Fprintf(&b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/>\n", at, up, colour)
			fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%.1f\" fill=\"%s\" text-anchor=\"middle\">%.4g</text>\n", at, up-9, colour, p.Is)
			fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%.4g</text>\n", at, height-margin+20, p.At)
		}
		fmt.Fprintf(&b, "<polyline points=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", strings.Join(path, " "), colour)
		fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" fill=\"%s\">%s</text>\n", margin, 22+18*i, colour, html.EscapeString(y))
	}
	fmt.Fprintf(&b, "<line x1=\"%d\" x2=\"%d\" y1=\"%d\" y2=\"%d\" stroke=\"#888\"/>\n", margin, width-margin, height-margin, height-margin)
	return svg(height, b.String())
}
