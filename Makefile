# executord. `make up` runs the main job, `make test` proves it; `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BUF := go tool -modfile=tools/go.mod buf
LINT := go tool -modfile=tools/lint/go.mod golangci-lint
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X github.com/harvest-run/executord/internal/version.version=$(VERSION)
GUEST := internal/guestbinary/bin/executor-guest

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: up
up: ## build, start executord here, and run a first program in a sandbox
	@scripts/prerequisites run
	@$(MAKE) --no-print-directory build
	@scripts/up

.PHONY: down
down: ## stop what `make up` started, with everything that runs in it
	@scripts/down

.PHONY: build
build: guest ## build executord, executorctl and the guest into bin/
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/executord ./cmd/executorctl

.PHONY: guest
guest: # the guest is embedded into executord, so it is built before it
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $(GUEST) ./cmd/executor-guest

.PHONY: test
test: ## everything: prerequisites, generated code, lint, unit, conformance and end-to-end tests
	@scripts/prerequisites test
	@$(MAKE) --no-print-directory build check-generate lint
	scripts/test-tools
	scripts/gotest ./...

.PHONY: test-modal-fake
test-modal-fake: build ## every end-to-end test that makes sense there with all sandboxes on a fake of Modal
	EXECUTORD_E2E_MODAL=fake go test -count=1 -timeout 30m ./test/e2e

.PHONY: test-modal
test-modal: build ## the conformance suite and end-to-end tests against Modal itself; needs MODAL_TOKEN_ID and MODAL_TOKEN_SECRET
	@test -n "$$MODAL_TOKEN_ID" -a -n "$$MODAL_TOKEN_SECRET" || { echo "set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET; docs/modal.md says how to get them" >&2; exit 1; }
	EXECUTORD_TEST_MODAL=1 CGO_ENABLED=0 go test -count=1 -timeout 60m -v -run 'TestConformanceLive' ./internal/engine/modal
	EXECUTORD_E2E_MODAL=real go test -count=1 -timeout 60m -v -run 'TestHello|TestBytes|TestFirstByte|TestResume|TestTimeout|TestCancel|TestStrays|TestReadOutput|TestKillWhileRunning|TestKillKeepsSessions|TestForwardedStdin|TestTerminal' ./test/e2e

.PHONY: lint
lint: ## go vet, golangci-lint, buf lint, buf breaking
	go vet ./...
	$(LINT) run
	$(BUF) lint
	scripts/breaking $(BUF)

.PHONY: generate
generate: ## generate gen/ from proto/
	$(BUF) format -w
	$(BUF) generate

.PHONY: check-generate
check-generate: ## fail if gen/ is not what proto/ generates
	scripts/check-generate $(BUF)

.PHONY: test-registries
test-registries: ## build the image base from Debian and npm, which downloads some 400 MB
	go test -count=1 -timeout 30m -v -tags registries -run TestFromRegistries ./internal/image/base

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME (30s) each
	scripts/fuzz $(or $(FUZZTIME),30s)

.PHONY: bench
bench: build ## measure executord beside what one would use instead; prints ratios
	@scripts/prerequisites bench
	go run ./test/bench -json bin/bench.json

.PHONY: plots
plots: ## draw the results of the last `make bench` into docs/performance
	go run ./test/bench plot bin/bench.json docs/performance

.PHONY: demo
demo: build ## run real programs (CPython's test suite, a C build, 200 MB from Node) and watch them
	@scripts/prerequisites test
	EXECUTORD_DEMO=1 go test -count=1 -v -run 'TestRealPrograms' ./test/e2e

.PHONY: robustness
robustness: build ## the long fault runs, many times over
	EXECUTORD_ROBUSTNESS=$(or $(COUNT),20) go test -count=1 -timeout 60m -v -run 'TestKill|TestReconnect|TestLeak' ./test/e2e

.PHONY: clean
clean: ## remove what was built
	rm -rf bin $(GUEST)
