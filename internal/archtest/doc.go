// Package archtest checks the rules of this house that a compiler does not: which
// package may know which (docs/architecture.md), and that goroutines, start-up code
// and state have owners. Each rule has its reason. The package has only tests.
package archtest
