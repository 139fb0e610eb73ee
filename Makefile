FUZZTIME ?= 20s
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2

# The fault suite: runs of so many messages, each run with a seed of its own.
RUNS ?= 20
MESSAGES ?= 2000

.PHONY: build test race lint fuzz interop faults bench

build: ; CGO_ENABLED=0 go build -trimpath -o bin/mailbridge ./cmd/mailbridge
test: ; go test ./...
race: ; go test -race -shuffle=on ./...
lint: ; test -z "$$(gofmt -l . | tee /dev/stderr)" && go vet -tags interop,faults ./... && go run $(STATICCHECK) -tags interop,faults ./...
fuzz: ; go list ./... | while read p; do for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz'); do echo "$$p $$f" && go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p || exit 1; done; done
interop: ; go test -tags interop -count=1 -timeout 20m ./internal/interop/
faults: ; RUNS=$(RUNS) MESSAGES=$(MESSAGES) go test -tags faults -count=1 -timeout 80m -v -run TestFaults ./internal/app
bench: ; go test -run '^$$' -bench . -benchmem ./...
